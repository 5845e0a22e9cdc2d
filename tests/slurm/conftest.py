"""One SLURM for all tests here, and what an uninterrupted run on one process gives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import uninterrupted
from tests.slurm.cluster import Cluster, unavailable


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = unavailable()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    for above in (folder, folder.parent):
        above.chmod(0o755)  # munged wants its socket where others can reach it
    made = Cluster(folder)
    made.env["PYTHON"] = sys.executable
    made.env["PATH"] = f"{Path(sys.executable).parent}:{made.env['PATH']}"
    for name in [n for n in made.env if n.startswith("DISTCL_")]:
        del made.env[name]
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return uninterrupted(tmp_path_factory.mktemp("reference"))
