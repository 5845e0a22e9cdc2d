"""Faults on purpose: a small job of 2 or 3 real processes, hit at a random place, then run again.

Each fault is tried with a random generator of its own. A try ends as

- recovered: the run, gone on with ``--resume auto`` where it stopped, has the draws, the weights
  and the accuracies of one that nobody disturbed, bit for bit;
- clean stop: it ended by itself with an exit code and a sentence that names the cause;
- wrong: anything else;
- hung: a process did not end within the limit.

Processes run the command line itself, with traps of tests/faults/traps.py in them.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from distcl.checkpoint.store import SCHEMA
from tests.faults.traps import (
    POINTS,
    Trap,
    arm,
    forbid_writing,
    kill,
    no_more_than,
    obey_permissions,
    remove,
    set_clock_back,
    terminate,
)
from tests.forked import Ended, Started
from tests.samples import samples, write_shards

LIMIT = 60.0
"""Seconds after which processes count as hung."""

JOB = """
[run]
poll_steps = 2
timeout_seconds = 20.0
report = false
[stream]
experiences = 3
samples_per_experience = 121
[model.options]
hidden = [8]
[optimizer]
lr = 0.1
momentum = 0.9
[training]
batch_size = 20
steps_per_round = 10
pretrain_epochs = 1
[continual_learning]
update_mode = "ewc_online"
importance_weighting = true
mix_historic_data = true
[priority]
score_batch = 32
[checkpoint]
every_steps = 4
every_minutes = 0
"""

# ---------------------------------------------------------------- a campaign


@dataclass(eq=False)
class Campaign:
    """The job, its undisturbed outcome, and the folder where runs are made."""

    folder: Path
    world: int = 2
    more: str = ""
    data: Path = Path()
    """What ``more``, tables added to the job, reads."""
    counts: dict[str, int] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _others: dict[str, Campaign] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = self.folder / "job.toml"
        self.config.write_text(JOB.replace("[stream]\n", f"[stream]\n{self.more}"))
        out, count = self.folder / "reference", self.folder / "counts.json"
        traps = [Trap(0, point, 0, kill) for point in POINTS]
        ended = self.start(out, traps=traps, count=count).end()
        assert ended.codes == [0] * self.world, ended
        self.counts = json.loads(count.read_text())
        self.reference = outcome(out)
        self.stopped = self.folder / "stopped"
        late = Trap(0, "step", self.counts["step"] - 5, terminate)
        ended = self.start(self.stopped, traps=[late]).end()
        assert ended.codes == [75] * self.world, ended

    def new(self) -> Path:
        return self.folder / f"run-{next(self._numbers):04d}"

    def copy(self) -> Path:
        """Return a new folder of a run that was stopped late, with several checkpoints."""
        return Path(shutil.copytree(self.stopped, self.new()))

    def on_shards(self) -> Campaign:
        """Return a campaign whose job reads shards."""
        return self._other("shards", self._make_shards)

    def on_arrays(self) -> Campaign:
        """Return a campaign whose job reads an .npz file."""
        return self._other("arrays", self._make_arrays)

    def _other(self, name: str, make: Callable[[], Campaign]) -> Campaign:
        with self._lock:
            if name not in self._others:
                self._others[name] = make()
            return self._others[name]

    def _make_shards(self) -> Campaign:
        data = self.folder / "shards"
        write_shards(data)
        more = f'source = "shards"\npath = "{data}"\n'
        return Campaign(self.folder / "on-shards", self.world, more, data)

    def _make_arrays(self) -> Campaign:
        data = self.folder / "arrays.npz"
        images, labels = samples()
        np.savez(data, x=images, y=labels)
        more = f'source = "arrays"\npath = "{data}"\n'
        return Campaign(self.folder / "on-arrays", self.world, more, data)

    def start(
        self,
        out: Path,
        *more: str,
        resume: str = "auto",
        traps: Any = (),
        count: Path | None = None,
    ) -> Started:
        argv = ("train", str(self.config), "--out", str(out), "--resume", resume, "--quiet", *more)
        said = self.folder / "said" / f"{out.name}.txt"
        return Started(argv, said, self.world, functools.partial(arm, list(traps), count))

    def finish(self, out: Path, *more: str, says: str = "") -> str:
        """Run to the end, and tell how it compares with the reference.

        A run that is done and has no checkpoint is not begun anew: it stays as it is.
        """
        ended = self.start(out, *more).end()
        if ended.hung:
            return f"hung: {ended}"
        if ended.codes != [0] * self.world and "holds a run that is done" not in ended.text:
            return f"wrong: {ended}"
        log = (out / "log.txt").read_text()
        if says not in ended.text + log:
            return f"wrong: it does not say '{says}': {ended.text}{log}"
        found = outcome(out)
        differing = [key for key, value in self.reference.items() if found[key] != value]
        if differing:
            return f"wrong: {', '.join(differing)} differ from an undisturbed run"
        shutil.rmtree(out)
        return "recovered"

    def judge(self, ended: Ended, codes: tuple[Any, ...], causes: tuple[str, ...] = ()) -> str:
        """Return '' if a run stopped as it should: with these codes, and one of these causes."""
        if ended.hung:
            return f"hung: {ended}"
        if any(code not in codes for code in ended.codes):
            return f"wrong: {ended}"
        bad = [word for word in ("Traceback", "internal error") if word in ended.text]
        if bad or (causes and not any(cause in ended.text for cause in causes)):
            return f"wrong: {ended}"
        return ""


def outcome(out: Path) -> dict[str, Any]:
    """Return what must be the same after every fault."""
    summary = json.loads((out / "summary.json").read_text())
    for line in (out / "metrics.jsonl").read_text().splitlines()[:-1]:
        json.loads(line)  # none is torn; the last may be, where the disk was full
    return {
        "draws": [r["draws_sha256"] for r in summary["rounds"]],
        "accuracies": summary["accuracy"],
        "weights": (out / "checkpoints" / "final.safetensors").read_bytes(),
    }


# ---------------------------------------------------------------- the faults

Try = Callable[[Campaign, Random], str]
GONE = ("lost contact with", "gone or unreachable")
"""What survivors say of a rank that died without a word."""


def kill_at(point: str) -> Try:
    """Kill one rank at a random call of a phase; the run goes on from its last checkpoint."""

    def attempt(c: Campaign, random: Random) -> str:
        victim = 0 if point in ("rename",) else random.randrange(c.world)
        call = random.randint(1, c.counts[point])
        out = c.new()
        trap = Trap(victim, point, call, kill, after=random.random() < 0.5)
        ended = c.start(out, traps=[trap]).end()
        if ended.codes[victim] == 0:  # fewer calls than on rank 0
            return c.finish(out)
        if ended.codes[victim] != -signal.SIGKILL:
            return f"wrong: {ended}"
        return c.judge(ended, (1, -signal.SIGKILL), GONE) or c.finish(out)

    return attempt


def terminate_at_random(c: Campaign, random: Random) -> str:
    """Ask one rank to stop; all save at the same step and leave with code 75."""
    point = random.choice(list(POINTS))
    victim = 0 if point == "rename" else random.randrange(c.world)
    out = c.new()
    ended = c.start(
        out, traps=[Trap(victim, point, random.randint(1, c.counts[point]), terminate)]
    ).end()
    if set(ended.codes) == {0}:  # it came after the last step
        return c.finish(out)
    status = json.loads((out / "status.json").read_text())
    if (status["state"], status["exit_code"]) != ("preempted", 75):
        return f"wrong: {status}"
    return c.judge(ended, (75,), ("SIGTERM received; the state is saved",)) or c.finish(out)


def terminate_twice(c: Campaign, random: Random) -> str:
    """A second signal, later, ends a rank at once; the last checkpoint stays whole."""
    out, rank = c.new(), random.randrange(c.world)
    call = random.randint(1, c.counts["step"] - 2)
    traps = [
        Trap(rank, "step", call, terminate),
        Trap(rank, "checkpoint write", random.randint(1, 6), _again),
    ]
    ended = c.start(out, traps=traps).end()
    if set(ended.codes) <= {75}:
        return c.finish(out)
    allowed = (1, 75, 128 + signal.SIGTERM)
    return c.judge(ended, allowed) or c.finish(out)


def _again() -> None:
    time.sleep(1.1)  # later than what counts as the same request
    terminate()


def disk_full(c: Campaign, random: Random) -> str:
    """From a random step on, a rank can write no large file; later the disk has room again."""
    out, rank = c.new(), random.randrange(c.world)
    call = random.randint(1, c.counts["step"])
    strike = functools.partial(no_more_than, random.choice((512, 4096)))
    ended = c.start(out, traps=[Trap(rank, "step", call, strike)]).end()
    if set(ended.codes) == {0}:
        return c.finish(out, says="was not written" if call < c.counts["step"] - 4 else "")
    return c.judge(ended, (1, 5), ("File too large", "large")) or c.finish(out)


def tmpfs_full(c: Campaign, random: Random) -> str:
    """The run folder lies on a file system too small for a second checkpoint."""
    out = c.new()
    size = random.randint(60, 300)
    with mounted(out, f"size={size}k"):
        ended = c.start(out).end()
        bad = "" if set(ended.codes) == {0} else c.judge(ended, (1, 2, 5), ("No space left",))
        if bad:
            return bad
        os.system(f"mount -o remount,size=100m {out}")
        copy = Path(shutil.copytree(out, c.new()))
    return c.finish(copy)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o {options} tmpfs {folder} 2>/dev/null"):
        raise NotPossible("mounting a tmpfs takes root")
    try:
        yield
    finally:
        os.system(f"umount {folder}")


class NotPossible(Exception):
    """This machine cannot try the fault."""


def read_only_from_the_start(c: Campaign, random: Random) -> str:
    out = c.new()
    out.mkdir()
    out.chmod(0o555)
    traps = [Trap(rank, "start", 0, obey_permissions) for rank in range(c.world)]
    ended = c.start(out, traps=traps).end()
    return c.judge(ended, (1, 2), ("is not writable: Permission denied",)) or "clean stop"


def read_only_midway(c: Campaign, random: Random) -> str:
    """The run folder loses its write permission at a random step; then it gets it back."""
    out = c.new()
    out.mkdir()
    traps = [Trap(rank, "start", 0, obey_permissions) for rank in range(c.world)]
    out.chmod(0o777)
    strike = functools.partial(forbid_writing, out)
    traps.append(Trap(0, "step", random.randint(2, c.counts["step"]), strike))
    ended = c.start(out, traps=traps).end()
    for path in (out, *out.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    bad = c.judge(ended, (1, 2, 5), ("Permission denied",))
    return bad or c.finish(out)


def damage(how: str) -> Try:
    """Harm one file of the newest checkpoint; the one before is used."""

    def attempt(c: Campaign, random: Random) -> str:
        out = c.copy()
        newest = max((out / "checkpoints").glob("step-*"))
        file = random.choice(sorted(newest.iterdir()))
        data = bytearray(file.read_bytes())
        if how == "truncated":
            del data[random.randrange(len(data)) :]
        elif how == "flipped":
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        elif how == "empty":
            data.clear()
        file.write_bytes(data)
        if how == "missing":
            file.unlink()
        return c.finish(out, says="falling back to the one before")

    return attempt


def every_checkpoint_damaged(c: Campaign, random: Random) -> str:
    out = c.copy()
    for path in (out / "checkpoints").glob("step-*"):
        file = random.choice(sorted(path.iterdir()))
        file.write_bytes(file.read_bytes()[:-1])
    ended = c.start(out).end()
    return c.judge(ended, (1, 5), ("no checkpoint in",)) or "clean stop"


def old_schema(c: Campaign, random: Random) -> str:
    """Checkpoints of an older version: the newest, then all."""
    out = c.copy()
    found = sorted((out / "checkpoints").glob("step-*"), reverse=True)
    every = random.random() < 0.5
    for path in found if every else found[:1]:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"schema": 0}))
    said = f"has schema 0; this version reads {SCHEMA}"
    if not every:
        return c.finish(out, says=f"{said}; falling back")
    return c.judge(c.start(out).end(), (1, 5), (said,)) or "clean stop"


def clock_jumps_back(c: Campaign, random: Random) -> str:
    """The clock of one rank goes back by up to a day; then the run is stopped and goes on."""
    out, rank = c.new(), random.randrange(c.world)
    strike = functools.partial(set_clock_back, random.uniform(1, 86400))
    call = random.randint(1, c.counts["step"] - 4)
    traps = [Trap(rank, "step", call, strike), Trap(rank, "step", call + 1, terminate)]
    ended = c.start(out, traps=traps).end()
    return c.judge(ended, (75,)) or c.finish(out)


def two_runs(c: Campaign, random: Random) -> str:
    """A second run on a folder is refused; when the first is killed, a new one gets the lock."""
    out = c.new()
    first = c.start(out, traps=[Trap(1, "step", c.counts["step"] - 2, _wait)])
    deadline = time.monotonic() + LIMIT
    while not (out / "status.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    second = c.start(out).end()
    bad = c.judge(second, (1, 2), ("is in use by another run",))
    if random.random() < 0.5:
        first.processes[0].kill()
        ended = first.end()
        return bad or c.judge(ended, (1, -signal.SIGKILL)) or c.finish(out)
    ended = first.end()
    return bad or c.judge(ended, (0,)) or c.finish(out)


def _wait() -> None:
    time.sleep(6)


def shards_vanish(c: Campaign, random: Random) -> str:
    """A shard is deleted at a random step; the run is not harmed, or names it and goes on later."""
    c = c.on_shards()
    out = c.new()
    data = Path(shutil.copytree(c.data, c.folder / f"{out.name}-shards"))
    keys = ("--set", f"stream.path={data}")
    shard = random.choice(sorted(data.glob("*.tar")))
    strike = functools.partial(remove, shard)
    rank, call = random.randrange(c.world), random.randint(1, c.counts["step"] // 3)
    ended = c.start(out, *keys, traps=[Trap(rank, "step", call, strike)]).end()
    shutil.copyfile(c.data / shard.name, shard)
    if set(ended.codes) == {0}:  # every rank had it open
        return c.finish(out, *keys)
    return c.judge(ended, (3,), (f"shard '{shard.name}' is missing",)) or c.finish(out, *keys)


def corrupt_label(c: Campaign, random: Random) -> str:
    """The label of one sample is no class; once it is mended, the run goes on."""
    c = c.on_arrays()
    out = c.new()
    data = Path(shutil.copyfile(c.data, c.folder / f"{out.name}.npz"))
    keys = ("--set", f"stream.path={data}")
    stop = Trap(0, "step", random.randint(1, c.counts["step"] - 5), terminate)
    if bad := c.judge(c.start(out, *keys, traps=[stop]).end(), (75,)):
        return bad
    with np.load(data) as arrays:
        x, y = arrays["x"], arrays["y"]
    values = (-1, 1 << 40, -(1 << 62))
    if random.random() < 0.5:
        y, values = y.astype(np.float64), (-1.0, 0.5, float("nan"))
    y[random.randrange(len(y))] = random.choice(values)
    np.savez(data, x=x, y=y)
    bad = c.judge(c.start(out, *keys).end(), (2, 3), (data.name, "the data differ"))
    shutil.copyfile(c.data, data)
    return bad or c.finish(out, *keys)


FAULTS: dict[str, Try] = {
    **{f"kill -9 in {point}": kill_at(point) for point in POINTS},
    "SIGTERM anywhere": terminate_at_random,
    "second signal": terminate_twice,
    "file-size limit": disk_full,
    "disk full (tmpfs)": tmpfs_full,
    "read-only folder": read_only_from_the_start,
    "folder turns read-only": read_only_midway,
    **{
        f"checkpoint file {how}": damage(how)
        for how in ("truncated", "flipped", "missing", "empty")
    },
    "every checkpoint damaged": every_checkpoint_damaged,
    "checkpoint of an older version": old_schema,
    "clock jumps back": clock_jumps_back,
    "two runs on one folder": two_runs,
    "shards vanish": shards_vanish,
    "corrupt label": corrupt_label,
}


def attempt(c: Campaign, fault: str, seed: int, number: int) -> str:
    """Try a fault; return recovered, clean stop, not possible here, or what went wrong."""
    try:
        return FAULTS[fault](c, Random(f"{seed} {fault} {number}"))
    except NotPossible as error:
        return f"not possible: {error}"
