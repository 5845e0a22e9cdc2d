"""The shipped job scripts on a real SLURM: they train, save when told to, requeue, and go on.

Each script is interrupted in another way, and must draw what an uninterrupted run on one process
draws, to the last sample.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.runs import JOB, draws, read, status, uninterrupted, wait_for, wait_for_round_2
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.timeout(300)


def submit(
    cluster: Cluster,
    script: str,
    out: Path,
    *options: str,
    config: str = JOB,
    overrides: tuple[str, ...] = (),
) -> str:
    """Submit a script as its users do; its output goes beside the run folder."""
    path = f"launch/slurm/{script}.sbatch"
    output = f"--output={out}.txt"
    tail = ("train", config, *overrides, "--out", str(out))
    done = cluster.call("sbatch", "--parsable", "--cpus-per-task=1", output, *options, path, *tail)
    return done.strip()


def finished(cluster: Cluster, job: str, out: Path, reference: list[str], starts: int) -> str:
    """Wait for the end of a job that was interrupted, check what it did, return its output."""
    facts = cluster.wait(job)
    said = read(out.parent, f"{out.name}.txt")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", str(starts - 1)), said
    assert status(out)["state"] == "done"
    assert draws(out) == reference
    assert f"start {starts}: ended as done, exit code 0" in said
    log = read(out, "log.txt")
    assert log.count("started by ") == starts
    assert log.count("[resume] from ") == starts - 1
    return said


def test_srun_per_process_warned_saves_requeues_and_goes_on(cluster, reference, tmp_path):
    out = tmp_path / "run"
    job = submit(cluster, "multi_node", out)
    wait_for_round_2(out)
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # as SLURM does before the time limit
    cluster.wait(job, "PENDING", "COMPLETING")
    saved = status(out)
    assert (saved["state"], saved["exit_code"]) == ("preempted", 75)
    assert "rank 0: SIGUSR1 received; the state is saved" in saved["reason"]
    said = finished(cluster, job, out, reference, starts=2)
    assert "start 1: ended as preempted, exit code 75\n" in said
    assert "start 1: saved and requeued\n" in said
    first = read(out, "log.txt").splitlines()[0]
    assert f"started by srun in SLURM job {job}: 2 processes on 2 nodes; " in first
    assert "node1: rank 0 on cpu; node2: rank 1 on cpu" in first


def test_a_time_limit_that_comes_near_is_no_end(cluster, tmp_path):
    longer = ("--set", "training.steps_per_round=6000", "--set", "stream.experiences=3")
    out = tmp_path / "run"
    # SLURM looks at limits every half minute, and warns that much earlier
    job = submit(cluster, "multi_node", out, "--time=1", "--signal=B:USR1@40", overrides=longer)
    cluster.wait(job, "RUNNING")
    cluster.wait(job, "PENDING", "COMPLETING")
    assert status(out)["state"] == "preempted"
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    reference = uninterrupted(tmp_path / "alone", *longer)
    said = finished(cluster, job, out, reference, starts=2)
    assert "SIGUSR1: the run is asked to save and stop" in said
    assert "start 1: saved and requeued" in said


def test_torchrun_on_two_nodes_is_preempted_by_a_job_of_higher_priority(
    cluster, reference, tmp_path
):
    out = tmp_path / "run"
    job = submit(cluster, "multi_node_torchrun", out, "--partition=low")
    wait_for_round_2(out)
    urgent = cluster.call(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive",
        "--output=/dev/null", "--wrap=sleep 1",
    ).strip()  # fmt: skip
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    said = finished(cluster, job, out, reference, starts=2)
    assert "SIGUSR1: the run is asked to save and stop" in said
    assert "started by torchrun in SLURM job" in read(out, "log.txt")


def test_accelerate_on_two_nodes_is_requeued_by_hand(cluster, reference, tmp_path):
    out = tmp_path / "run"
    job = submit(cluster, "multi_node_accelerate", out)
    wait_for_round_2(out)
    cluster.call("scontrol", "requeue", job)  # SIGTERM, and SIGKILL five seconds later
    finished(cluster, job, out, reference, starts=2)
    assert "started by accelerate launch in SLURM job" in read(out, "log.txt")


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, tmp_path):
    out = tmp_path / "run"
    cluster.env["PROCESSES"] = "2"
    job = submit(cluster, "single_node", out)
    del cluster.env["PROCESSES"]
    wait_for_round_2(out)
    cluster.call("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    assert status(out)["state"] == "preempted"
    assert "SIGTERM received; the state is saved" in status(out)["reason"]
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")


def test_a_failing_rank_fails_the_job_with_its_cause_and_is_not_requeued(cluster, tmp_path):
    out = tmp_path / "run"
    job = submit(cluster, "multi_node", out)
    wait_for_round_2(out)
    victim = wait_for(lambda: _rank_1(cluster, job), "the process of rank 1")
    cluster.call("kill", f"-{signal.SIGKILL}", str(victim))
    facts = cluster.wait(job)
    said = read(tmp_path, "run.txt")
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0"), said
    assert "lost contact with another rank" in said
    assert status(out)["state"] == "failed"
    assert "requeued" not in said


def _rank_1(cluster: Cluster, job: str) -> int | None:
    marks = {b"SLURM_PROCID=1", f"SLURM_JOB_ID={job}".encode()}
    for pid in cluster.processes():
        if marks <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
            return pid
    return None


def test_a_run_that_cannot_start_says_why_and_is_not_requeued(cluster, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    # what an earlier start left behind must not make this one requeue itself for ever
    (out / "status.json").write_text('{"state": "preempted", "exit_code": 75}')
    job = submit(cluster, "multi_node", out, config="absent.toml")
    facts = cluster.wait(job)
    said = read(tmp_path, "run.txt")
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0"), said
    assert "distcl: absent.toml: no such file" in said
    assert "ended with code 2, before it wrote " in said
