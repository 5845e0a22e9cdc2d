"""distcl doctor under a launcher: what the processes are to each other."""

import re

from tests.spawn import distcl, run_ranks


def test_doctor_measures_what_the_processes_share():
    done = distcl("doctor", ranks=2)
    assert done.returncode == 0, done.stderr
    lines = dict(re.findall(r"^ok +(.+?) {2,}(.+)$", done.stdout, re.MULTILINE))
    assert lines["launcher"] == "torchrun, 2 process(es)"
    assert lines["processes"].startswith("started by torchrun: 2 processes; ")
    assert lines["shared folder"].startswith("all processes see /")
    assert int(re.fullmatch(r"within (\d+) ms", lines["clocks"])[1]) < 2000
    assert re.match(r"[\d,]+ µs for a sum of 8 bytes", lines["latency"])
    assert float(re.match(r"([\d.]+) GB/s per rank", lines["bandwidth"])[1]) > 0
    assert done.stdout.count("shared folder") == 1


def _see(folders):
    import os
    from pathlib import Path

    from distcl.distributed import doctor, rendezvous
    from distcl.distributed.doctor import Finding

    rank = int(os.environ["RANK"])
    rendezvous.socket.gethostname = lambda: f"host{rank}"
    doctor._SEEN_SECONDS = 0.2
    doctor.existing = lambda folder: Path(folders[rank])
    doctor.Path.exists = lambda self: rank == 0  # as if the disk were another one
    own = [Finding("warning", "memory", "little")] if rank else []
    return doctor.examine_group(own)


def test_a_folder_that_is_not_shared_and_troubles_of_other_nodes_are_named(tmp_path):
    first, second = run_ranks(2, _see, [str(tmp_path), str(tmp_path)])
    assert first == second
    texts = {finding.topic: (finding.level, finding.text) for finding in first}
    assert texts["memory"] == ("warning", "on host1: little")
    level, text = texts["shared folder"]
    assert level == "broken"
    assert f"{tmp_path} of host0 is another folder on host1; put --out on a shared" in text
    assert list(tmp_path.iterdir()) == []
