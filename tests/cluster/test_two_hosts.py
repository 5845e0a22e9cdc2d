"""Two hosts that share a disk and a cable: they train as one, and a cut cable ends both."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import ADDRESSES, PORT, Hosts, unavailable
from tests.runs import JOB, draws, read, status, uninterrupted, wait_for_round_2

pytestmark = pytest.mark.timeout(300)

STARTERS = {
    "torchrun": (
        "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--master-addr", ADDRESSES[0], "--master-port", PORT, "--node-rank",
    ),
    # --multi_gpu is accelerate's word for several processes; with --cpu it starts only one
    "accelerate launch": (
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2",
        "--num_processes", "2", "--rdzv_backend", "static", "--mixed_precision", "no",
        "--main_process_ip", ADDRESSES[0], "--main_process_port", PORT, "--machine_rank",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    reason = unavailable()
    if reason:
        pytest.skip(reason)
    with Hosts().up() as made:
        yield made


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return uninterrupted(tmp_path_factory.mktemp("reference"))


def start(hosts: Hosts, starter: str, out: Path, *more: str) -> list[subprocess.Popen[str]]:
    job = ("-m", "distcl", "train", JOB, "--out", str(out), *more)
    return [hosts.start(host, *STARTERS[starter], str(host), *job) for host in (0, 1)]


def end(processes: list[subprocess.Popen[str]], seconds: float) -> tuple[list[int], list[str]]:
    try:
        errors = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def test_accelerate_trains_on_two_hosts_as_on_one(hosts, reference, tmp_path):
    out = tmp_path / "run"
    codes, errors = end(start(hosts, "accelerate launch", out), 150)
    assert codes == [0, 0], errors
    assert draws(out) == reference
    first = read(out, "log.txt").splitlines()[0]
    assert "started by accelerate launch: 2 processes on 2 nodes; " in first
    assert "; hostA: rank 0 on cpu; hostB: rank 1 on cpu; " in first


def test_a_cut_cable_ends_both_hosts_with_the_cause_and_resuming_goes_on(
    hosts, reference, tmp_path
):
    out = tmp_path / "run"
    processes = start(hosts, "torchrun", out, "--set", "run.timeout_seconds=8")
    try:
        wait_for_round_2(out)
        hosts.cable("down")
        codes, errors = end(processes, 90)
    finally:
        hosts.cable("up")
    assert 0 not in codes
    causes = (
        r"lost contact with another rank, which is gone|no sign of life for 8 s: .* out of reach"
    )
    for said in errors:  # whichever is noticed first
        assert re.search(rf"distcl: rank [01]: ({causes})", said), said
    assert status(out)["state"] == "failed"
    assert re.search(causes, status(out)["reason"])

    codes, errors = end(start(hosts, "torchrun", out, "--resume", "auto"), 150)
    assert codes == [0, 0], errors
    assert draws(out) == reference
    assert "[resume] from " in read(out, "log.txt")


def test_doctor_looks_at_both_hosts(hosts, tmp_path):
    command = (*STARTERS["torchrun"], "{}", "-m", "distcl", "doctor")
    told = [hosts.start(i, *(word.format(i) for word in command)) for i in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in told]
    assert [process.returncode for process in told] == [0, 0], outputs
    assert "; hostA: rank 0 on cpu; hostB: rank 1 on cpu; " in outputs[0]
    assert "all processes see" in outputs[0]
    assert outputs[1] == ""
