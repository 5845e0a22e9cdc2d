"""Which samples each config draws, and the weights it ends with, recorded in ``draws.json``.

A change that is to keep draws (a move, a merge, a faster way) must leave them as they are; one that
is to change them records them anew and says so: ``python -m tests.draws``. With ``--code FOLDER``
another checkout's package runs, to record the state before a change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from tests.config_files import CONFIGS, command_of, small_sets
from tests.spawn import free_port

RECORD = Path(__file__).with_name("draws.json")


def machine() -> str:
    """What rounding depends on: the kernels' instruction set, the processor and torch."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((x.split(":")[1].strip() for x in info if x.startswith("model name")), "?")
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def outcome(out: Path) -> dict[str, object]:
    """The draws of each round of a run folder, and the digest of its final weights."""
    rounds = json.loads((out / "summary.json").read_text(encoding="utf-8"))["rounds"]
    weights = hashlib.sha256()
    for name, value in sorted(load_file(out / "checkpoints" / "final.safetensors").items()):
        weights.update(name.encode() + value.tobytes())
    return {"draws": [r["draws_sha256"] for r in rounds], "weights": weights.hexdigest()}


def recorded(path: Path, ranks: int) -> dict[str, object]:
    """Return what is recorded of a config; skip the test where rounding may be another."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["machine"] != machine():
        pytest.skip(f"recorded on {record['machine']}, not on {machine()}")
    return dict(record[path.stem][str(ranks)])


def run(path: Path, ranks: int, folder: Path, code: Path) -> dict[str, object]:
    """Run a config on that many ranks of another checkout's package and return its outcome."""
    data, out = folder / "data", folder / "out"
    data.mkdir()
    sets = [word for text in small_sets(path, data) for word in ("--set", text)]
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port"]
        start += [str(free_port()), "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(code)}
    subprocess.run(
        [*start, "distcl", command_of(path), str(path), "--out", str(out), *sets],
        env=environment, cwd=code, check=True, capture_output=True,
    )  # fmt: skip
    return outcome(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--code", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", help="names of configs")
    parser.add_argument("--to", type=Path, default=RECORD)
    options = parser.parse_args()
    record = json.loads(options.to.read_text()) if options.to.exists() else {}
    record["machine"] = machine()
    for path in CONFIGS:
        if options.only and path.stem not in options.only:
            continue
        for ranks in options.ranks:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found = run(path, ranks, Path(folder), options.code.resolve())
                except subprocess.CalledProcessError as error:
                    lines = error.stderr.decode(errors="replace").splitlines()
                    found = {"failed": next((x for x in lines if "distcl:" in x), lines[-1:])}
                    print(path.stem, ranks, found, flush=True)
            record.setdefault(path.stem, {})[str(ranks)] = found
        options.to.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
