"""What processes refuse to do together."""

from dataclasses import replace

import pytest

from distcl.distributed.environment import Launch
from distcl.distributed.rendezvous import Peer, code_version, first_line, proven_skew, refusal

GPUS = [
    Peer(rank, f"n{rank // 2}", f"cuda:{rank % 2}", f"GPU-{rank}", 100.0, "distcl 1")
    for rank in range(4)
]


def test_one_process_per_gpu_is_fine():
    assert refusal(GPUS, [0.0] * 4) == ""
    cpus = [replace(peer, gpu="", device="cpu") for peer in GPUS]
    assert refusal(cpus, [0.0] * 4) == ""


def test_two_processes_on_one_gpu_are_named():
    peers = [*GPUS[:3], replace(GPUS[3], gpu="GPU-2", device="cuda:0")]
    assert refusal(peers, [0.0] * 4).startswith("ranks 2 and 3 are on one GPU, cuda:0 of n1;")


def test_other_code_is_named():
    peers = [*GPUS[:3], replace(GPUS[3], code="distcl 2")]
    assert refusal(peers, [0.0] * 4) == (
        "rank 3 on n1 runs distcl 2, but rank 0 on n0 runs distcl 1; install the same on every node"
    )


@pytest.mark.parametrize(("skew", "word"), [(40.0, "ahead of"), (-40.0, "behind")])
def test_a_wrong_clock_is_named(skew, word):
    assert f"the clock of rank 1 on n0 is 40 s {word} rank 0's" in refusal(GPUS, [0, skew, 0, 0])


def test_only_what_cannot_be_lateness_is_a_wrong_clock():
    assert proven_skew(10.0, 10.5, 11.0) == 0
    assert proven_skew(10.0, 12.0, 500.0) == 0  # rank 0 came late to look
    assert proven_skew(10.0, 14.0, 11.0) == 3
    assert proven_skew(10.0, 4.0, 11.0) == -6


def test_the_first_line_says_who_is_where():
    line = first_line(Launch("srun", "SLURM job 7", 0, 4, 0, 2), GPUS)
    assert line == (
        "started by srun in SLURM job 7: 4 processes on 2 nodes; n0: ranks 0 to 1 on cuda:0 to "
        "cuda:1; n1: ranks 2 to 3 on cuda:0 to cuda:1; distcl 1"
    )
    alone = first_line(Launch("hand", "", 0, 1, 0, 1), [Peer(0, "n", "cpu", "", 0.0, "distcl 1")])
    assert alone == "started by hand: 1 process; n: rank 0 on cpu; distcl 1"


def test_the_code_version_names_its_files():
    assert code_version().startswith("distcl 0.")
    assert "torch 2." in code_version()
