"""What launchers leave in the environment, read and translated."""

import pytest

from distcl.distributed.environment import Launch, adopt, first_node, rank_of, tasks_on_node
from distcl.errors import UsageError

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "GROUP_WORLD_SIZE": "2",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "10012",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "gpu[003-005]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def detect(environ: dict[str, str]) -> Launch:
    return adopt(dict(environ))


def test_a_plain_process_is_alone():
    assert detect({}) == Launch("hand", "", 0, 1, 0, 1)
    in_job = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}  # a batch script
    assert str(detect(in_job)) == "hand in SLURM job 7"


def test_torchrun_and_accelerate_are_told_apart():
    assert detect(TORCHRUN) == Launch("torchrun", "", 3, 4, 1, 2)
    accelerate = TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "no"}
    assert detect(accelerate).launcher == "accelerate launch"


def test_variables_set_by_hand_count():
    found = detect({"RANK": "1", "WORLD_SIZE": "2"})
    assert found == Launch("RANK and WORLD_SIZE", "", 1, 2, 1, 2)
    with pytest.raises(UsageError, match="RANK = 2 but WORLD_SIZE = 2"):
        detect({"RANK": "2", "WORLD_SIZE": "2"})
    with pytest.raises(UsageError, match="WORLD_SIZE = 'two' is not a number"):
        detect({"RANK": "0", "WORLD_SIZE": "two"})


def test_srun_gives_torchs_variables_once():
    environ = dict(SRUN)
    found = adopt(environ)
    assert found == Launch("srun", "SLURM job 10012", 5, 6, 1, 2)
    added = {k: v for k, v in environ.items() if k not in SRUN}
    assert added == {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": "20012",
    }
    assert adopt(environ) == found
    assert environ == SRUN | added


def test_an_address_that_the_job_script_chose_is_kept():
    environ = SRUN | {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1234"}
    adopt(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("elsewhere", "1234")


def test_srun_and_a_left_over_world_size_disagree():
    for stale in ({"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": "8"}, {"RANK": "0"}):
        with pytest.raises(UsageError, match=r"srun started 6 processes.*unset RANK WORLD_SIZE"):
            detect(SRUN | stale)


def test_torchruns_under_srun_that_do_not_know_each_other_are_refused():
    with pytest.raises(UsageError, match="srun started 6 launchers but each works with 2"):
        detect(SRUN | TORCHRUN)
    assert detect(SRUN | TORCHRUN | {"GROUP_WORLD_SIZE": "6"}).world_size == 4
    assert detect(SRUN | TORCHRUN | {"SLURM_STEP_NUM_TASKS": "1"}).world_size == 4


@pytest.mark.parametrize(
    "names",
    [
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        ("PMI_RANK", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
        tuple(MPIRUN),
    ],
)
def test_mpi_on_one_node(names):
    environ = dict(zip(names, ("1", "2", "1", "2"), strict=True))
    assert rank_of(environ) == 1
    assert adopt(environ) == Launch("mpirun", "", 1, 2, 1, 2)
    assert environ["MASTER_ADDR"] == "127.0.0.1"
    assert 20_000 <= int(environ["MASTER_PORT"]) < 30_000


def test_mpi_on_several_nodes_needs_an_address():
    environ = MPIRUN | {"OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(UsageError, match="export MASTER_ADDR"):
        detect(environ)
    assert detect(environ | {"MASTER_ADDR": "a"}).local_world_size == 2


def test_mpirun_inside_a_slurm_job_is_not_taken_for_srun():
    assert detect(SRUN | MPIRUN).launcher == "mpirun"
    pmi2 = {"PMI_RANK": "5", "PMI_SIZE": "6"}  # srun --mpi=pmi2 sets these
    assert detect(SRUN | pmi2).launcher == "srun"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("a1,b2", "a1"),
        ("gpu[003-007,9]", "gpu003"),
        ("x[01,04]-ib,y[2-3]", "x01-ib"),
        ("nid001234,nid[001300-001302]", "nid001234"),
    ],
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert first_node(nodes) == first


def test_no_nodes_at_all():
    with pytest.raises(UsageError, match="names no node"):
        first_node("")


def test_tasks_of_a_node():
    assert [tasks_on_node("4(x2),1", node) for node in range(3)] == [4, 4, 1]
    with pytest.raises(UsageError, match="every node"):
        tasks_on_node("4", 1)
