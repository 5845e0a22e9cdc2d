"""Signals that ask a run to stop."""

import os
import signal
import subprocess
import sys

import pytest

from distcl.checkpoint.preemption import Preemption

SECOND = """
import os, signal, time
from distcl.checkpoint import preemption
from distcl.checkpoint import saver
preemption.SAME_SECONDS = 0.05
asked = preemption.Preemption(0)
asked.install()
os.kill(os.getpid(), signal.SIGTERM)
assert asked.reason == "SIGTERM received"
time.sleep(0.1)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(5)
"""


@pytest.fixture
def asked():
    made = Preemption(0)
    made.install()
    yield made
    made.remove()


def test_signals_that_come_at_once_are_one_request(asked):
    assert not asked.asked
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):  # from SLURM and a launcher
        os.kill(os.getpid(), number)
    assert asked.asked
    assert asked.reason == "SIGUSR1 received"


def test_a_later_signal_ends_the_process_at_once():
    done = subprocess.run([sys.executable, "-c", SECOND], timeout=60)
    assert done.returncode == 128 + signal.SIGTERM


def test_the_first_signal_after_the_time_is_over_does_not_end_the_process(asked):
    asked.reason = "run.max_minutes is over"
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked.reason == "run.max_minutes is over"
