"""What a sample in shards costs in memory, measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distcl.data.shards.manifest import read_shards, write_manifest
from tests.files import shard_folder

ROOT = Path(__file__).parents[2]

_MEASURE = """
import resource, sys
import numpy as np
from distcl.config import DataConfig
from distcl.data.shards.manifest import read_shards
from distcl.data.shards.indexed import ShardSource
from pathlib import Path
folder, copies = Path(sys.argv[1]), int(sys.argv[2])
shards = read_shards(folder).split("train")[:copies]
source = ShardSource(folder, shards, DataConfig())
labels = source.info.known_labels()
rng = np.random.default_rng(0)
for _ in range(300):
    source.read(rng.integers(0, len(source), 64))
print(len(source), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_grows_by_at_most_48_bytes_a_sample(tmp_path: Path) -> None:
    one = shard_folder(tmp_path / "one", [10_000])
    many = tmp_path / "many"
    many.mkdir()
    shard = read_shards(one).shards[0]
    listed = []
    for s in range(400):
        for end in (".tar", ".index.npy"):
            os.link(one / f"s0{end}", many / f"s{s:03d}{end}")
        listed.append(replace(shard, name=f"s{s:03d}.tar", first_id=s * 10_000))
    write_manifest(many, replace(read_shards(one), shards=listed))
    found = [
        subprocess.run(
            [sys.executable, "-c", _MEASURE, str(many), str(copies)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ).stdout.split()
        for copies in (100, 400)
    ]
    (n, peak), (more, higher) = [(int(a), int(b)) for a, b in found]
    assert (n, more) == (1_000_000, 4_000_000)
    assert (higher - peak) / (more - n) <= 48


@pytest.mark.timeout(300)
def test_a_round_by_weight_keeps_few_bytes_a_sample(tmp_path: Path) -> None:
    """48 are the aim, of a million samples and more; with fewer, what else grows counts too."""
    found = tmp_path / "found.json"
    script = [ROOT / "benchmarks" / "shards_memory.py", "--what", "train", "--access", "indexed"]
    subprocess.run(
        [sys.executable, *script, "--samples", "40000", "160000", "--ranks", "1", "--json", found],
        check=True,
        capture_output=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    (slope,) = json.loads(found.read_text()).values()
    assert 16 <= slope <= 64  # two more arrays, of weights or of ids, are too many
