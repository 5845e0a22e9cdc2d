"""Runs of several variants of a configuration over the same seeds, at equal cost.

Every run is a process of its own, ``distcl train`` or ``distcl run``, with a run folder under the
comparison's: ``OUT/VARIANT/seed-N``. Runs that are done stay, so an interrupted comparison goes on.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean
from typing import Any, Literal

from distcl.config import Config
from distcl.config.load import load_config, to_toml
from distcl.errors import DistclError, DivergenceError, UsageError
from distcl.reporting.figures import FIGURES, Words, stages, untrained, words_of
from distcl.reporting.run_folder import holds_run, make_numbered, numbered_folders
from distcl.reporting.status import read_json

Equal = Literal["compute", "steps", "samples"]

MEASURES = {"compute": "units", "steps": "steps", "samples": "trained"}
"""What ``equal`` makes equal, by its name in a run's cost."""

TOLERANCE = 0.01
"""How far costs that count as equal may be apart, relatively."""

Start = Callable[[Sequence[str], Mapping[str, str]], tuple[int, str]]
"""Runs ``distcl`` with these arguments and this environment; returns exit code and stderr."""

_TRIALS = 3
_PREEMPTED = 75


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the things compared: the configuration with ``overrides``, ``section.key=value``."""

    name: str
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """A name for its folder, the same whatever else is compared."""
        digest = hashlib.sha256("\0".join(self.overrides).encode()).hexdigest()[:6]
        words = re.sub(r"[^A-Za-z0-9_.]+", "-", self.name).strip("-")
        return f"{words[:48]}-{digest}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to. A diverged one has no figures.

    ``figures``: by their keys in ``summary.json``. ``cost``: ``units`` of compute, of which a
    forward of a sample is one, forward and backward three; ``steps``; samples ``trained``, which
    went forward and backward; ``seconds``. ``curve``: after each evaluation, the mean over the
    experiences seen by then.
    """

    seed: int
    folder: str
    diverged: bool = False
    metric: str = "accuracy"
    higher_is_better: bool = True
    figures: Mapping[str, float | None] = field(
        default_factory=lambda: dict.fromkeys(figure.key for figure in FIGURES)
    )
    cost: Mapping[str, float] = field(
        default_factory=lambda: dict.fromkeys(("units", "steps", "trained", "seconds"), 0)
    )
    curve: tuple[float, ...] = ()

    @property
    def words(self) -> Words:
        """How its score is told."""
        return words_of(self.metric, higher=self.higher_is_better)


@dataclass
class Arm:
    """A variant, the factor on its steps, and what its runs came to, by seed."""

    variant: Variant
    step_factor: float = 1.0
    outcomes: dict[int, Outcome] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be compared, and how; ``jobs`` = 0: as many at once as cores or GPUs allow.

    ``overwrite``: runs of another configuration that are in the way are replaced.
    """

    config: Path
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    out: Path
    overrides: tuple[str, ...] = ()
    command: Literal["train", "run"] = "train"
    equal: Equal = "compute"
    jobs: int = 0
    overwrite: bool = False


def parse_variant(text: str) -> Variant:
    """Read a variant: ``section.key=value``, several of them with semicolons between.

    ``NAME: `` before them is what it is called.
    """
    name, colon, keys = text.partition(":")
    named = bool(colon) and "=" not in name
    parts = tuple(part.strip() for part in (keys if named else text).split(";") if part.strip())
    if not parts or (named and not name.strip()):
        raise UsageError(f"--vs '{text}': must have the form section.key=value, or NAME: and that")
    return Variant(name.strip() if named else "; ".join(parts), parts)


def run_plan(plan: Plan, tell: Callable[[str], None], start: Start | None = None) -> list[Arm]:
    """Run what is missing and return all arms, in the plan's order.

    The first seed's runs tell what each variant costs; those that cost less get a factor on their
    steps (``training.step_factor``). ``start``: another way to start a run of one process than
    ``python -m distcl``. Raises UsageError naming the run that failed, and how, or one of another
    configuration that is in the way; divergence is an outcome, not a failure.
    """
    runner = _Runner(plan, tell, start)
    arms = [Arm(variant) for variant in plan.variants]
    try:
        taken = None if plan.overwrite else runner.in_the_way()
        if taken is not None:
            raise UsageError(
                f"'{taken}' holds a run of another configuration: replace it (--overwrite), or "
                "give --out another folder"
            )
        _balance(plan, runner, arms)
        runner.run([(arm, seed) for seed in plan.seeds for arm in arms])
    finally:
        runner.close()
    return arms


def with_folder(plan: Plan) -> Plan:
    """Return the plan with the folder to use of OUT, OUT-2, …: its own, if it was begun, or new."""
    for path in reversed(numbered_folders(plan.out)):
        found = replace(plan, out=path)
        if path.is_dir() and _Runner(found, lambda _: None).in_the_way() is None:
            return found
    return replace(plan, out=make_numbered(plan.out))


def _balance(plan: Plan, runner: _Runner, arms: Sequence[Arm]) -> None:
    """Find the factors that make all arms cost as much as the dearest one."""
    measure = MEASURES[plan.equal]
    for seed in plan.seeds:
        runner.run([(arm, seed) for arm in arms], calibrating=True)
        if not any(arm.outcomes[seed].diverged for arm in arms):
            break
    else:
        return  # there is no seed that all arms survive: nothing to compare anyway
    base = {id(arm): arm.outcomes[seed].cost[measure] for arm in arms}
    target = max(base.values())
    for arm in arms:
        cost, slope = base[id(arm)], 3.0 * arm.outcomes[seed].cost["trained"]
        slope = slope if plan.equal == "compute" else cost
        for _ in range(_TRIALS):
            if not slope or abs(cost - target) <= TOLERANCE * target / 10:
                break
            before, factor = cost, arm.step_factor
            arm.step_factor = round(factor + (target - cost) / slope, 6)
            del arm.outcomes[seed]
            runner.run([(arm, seed)], calibrating=True)
            if arm.outcomes[seed].diverged:
                break
            cost = arm.outcomes[seed].cost[measure]
            slope = (cost - before) / (arm.step_factor - factor) or slope


class _Runner:
    """Starts runs, so many at a time, and reads what they came to."""

    def __init__(self, plan: Plan, tell: Callable[[str], None], start: Start | None = None) -> None:
        self._plan = plan
        self._tell = tell
        self._start_run = start or self._popen
        self._ranks = max(
            1, *(self._config(Arm(v), plan.seeds[0]).parallel.processes for v in plan.variants)
        )
        cores, devices = len(os.sched_getaffinity(0)), _devices()
        room = (len(devices) or cores) // self._ranks
        self._jobs = max(1, plan.jobs or room)
        self._threads = max(1, cores // (self._jobs * self._ranks))
        self._places: SimpleQueue[list[str]] = SimpleQueue()
        for k in range(self._jobs):
            at = k * self._ranks
            self._places.put(
                [devices[(at + r) % len(devices)] for r in range(self._ranks)] if devices else []
            )
        self._pool = ThreadPoolExecutor(self._jobs)
        self._children: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def in_the_way(self) -> Path | None:
        """Return a folder that the plan would use and that holds another run, None without."""
        others = (
            self._folder(Arm(v), s)
            for v in self._plan.variants
            for s in self._plan.seeds
            if not self._same(Arm(v), s)
        )
        return next((path for path in (self._plan.out, *others) if holds_run(path)), None)

    def run(self, wanted: Sequence[tuple[Arm, int]], calibrating: bool = False) -> None:
        """Run what is not done yet, and put all outcomes into the arms.

        ``calibrating``: to learn what a variant costs; such a run counts if the costs are equal.
        """
        todo: dict[Future[Outcome], Arm] = {}
        for arm, seed in wanted:
            if seed in arm.outcomes:
                continue
            found = self._found(arm, seed)
            if found is not None:
                arm.outcomes[seed] = found
            else:
                todo[self._pool.submit(self._start, arm, seed)] = arm
        if calibrating and todo:
            self._tell(
                f"[calibration] {len(todo)} run{'s' * (len(todo) > 1)} on seed {wanted[0][1]}, to "
                f"make {self._plan.equal} equal"
            )
        done = len(wanted) - len(todo)
        for number, future in enumerate(as_completed(todo), 1):
            outcome = future.result()
            todo[future].outcomes[outcome.seed] = outcome
            accuracy = outcome.figures["average_accuracy"]
            what = outcome.words.name + ("" if accuracy is None else f" {accuracy:.4f}")
            which = "calibration" if calibrating else f"{done + number}/{len(wanted)}"
            self._tell(
                f"[{which}] {todo[future].variant.name}, seed {outcome.seed}: "
                f"{'diverged' if outcome.diverged else what} ({outcome.cost['seconds']:.0f} s)"
            )

    def close(self) -> None:
        """Stop what runs: each saves its state if it can. Then wait."""
        self._stopped = True
        for child in list(self._children):
            child.terminate()
        self._pool.shutdown(cancel_futures=True)

    def _overrides(self, arm: Arm, seed: int) -> list[str]:
        given = [*self._plan.overrides, *arm.variant.overrides]
        factor = load_config(self._plan.config, given).training.step_factor * arm.step_factor
        mine = {
            "run.seed": seed,
            "run.report": "false",
            "training.step_factor": factor,
            "tracking.kind": "jsonl",
        }
        return given + [f"{key}={value}" for key, value in mine.items()]

    def _config(self, arm: Arm, seed: int) -> Config:
        config = load_config(self._plan.config, self._overrides(arm, seed))
        out = str(self._folder(arm, seed))
        return config.model_copy(update={"run": config.run.model_copy(update={"out": out})})

    def _folder(self, arm: Arm, seed: int) -> Path:
        scaled = "" if arm.step_factor == 1.0 else f"-x{arm.step_factor:g}"
        return self._plan.out / f"{arm.variant.folder}{scaled}" / f"seed-{seed}"

    def _same(self, arm: Arm, seed: int) -> bool:
        """Whether the folder holds a run of this very configuration and command."""
        status = read_json(self._folder(arm, seed), "status.json") or {}
        if status.get("command", self._plan.command) != self._plan.command:
            return False
        try:
            text = (self._folder(arm, seed) / "config.toml").read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return False
        return text.strip() == to_toml(self._config(arm, seed)).strip()

    def _found(self, arm: Arm, seed: int) -> Outcome | None:
        """Return what a run came to, None if it is not over or is of another configuration."""
        folder = self._folder(arm, seed)
        status = read_json(folder, "status.json") or {}
        if not self._same(arm, seed):
            return None
        if status.get("state") == "failed" and status.get("exit_code") == DivergenceError.exit_code:
            return Outcome(seed, str(folder), diverged=True)
        summary = read_json(folder, "summary.json") if status.get("state") == "done" else None
        return None if summary is None else outcome_of(folder, summary)

    def _start(self, arm: Arm, seed: int) -> Outcome:
        """Run one run to its end, in a thread of the pool."""
        place = self._places.get()
        try:
            folder, way = self._folder(arm, seed), ["--resume", "auto"]
            if not self._same(arm, seed):
                way = ["--overwrite"] if self._plan.overwrite else []
            code, complaint = self._process(
                [self._plan.command, str(self._plan.config), "--out", str(folder)]
                + [word for one in self._overrides(arm, seed) for word in ("--set", one)]
                + [*way, "--quiet"],
                place,
            )
        finally:
            self._places.put(place)
        found = self._found(arm, seed)
        if found is None:
            error = DistclError(
                f"the run of '{arm.variant.name}' with seed {seed} "
                + ("was stopped" if self._stopped else f"failed: {complaint}")
                + f"; its folder is {folder}, and the same command goes on"
            )
            error.exit_code = code if 0 < code < 128 else 1
            raise error
        return found

    def _process(self, arguments: list[str], place: list[str]) -> tuple[int, str]:
        """Return the exit code of a run, and the first line that it complained."""
        environment = {"OMP_NUM_THREADS": str(self._threads), **os.environ}
        if place:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(place)
        if self._stopped:
            return _PREEMPTED, ""
        code, complaint = self._start_run(arguments, environment)
        lines = [line for line in complaint.splitlines() if line.startswith("distcl: ")]
        first = lines[0].removeprefix("distcl: ") if lines else complaint.strip()[-500:]
        return code, first or f"exit code {code}"

    def _popen(self, arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
        start = [sys.executable, "-m"]
        if self._ranks > 1:
            torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
            start += [*torchrun, str(self._ranks), "-m"]
        with subprocess.Popen(
            [*start, "distcl", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as child:
            self._children.add(child)
            _, complaint = child.communicate()
            self._children.discard(child)
        return child.returncode, complaint


def outcome_of(folder: Path, summary: dict[str, Any]) -> Outcome:
    """Return what the run of a folder came to, by its ``summary.json``."""
    cut, cost = len(untrained(summary)), summary.get("compute") or {}
    rows = [row[: len(row) - cut][: k + 1] for k, row in enumerate(summary["accuracy"])]
    seen = [[value for value in row if value is not None] for row in rows]
    return Outcome(
        seed=summary["seed"],
        folder=str(folder),
        metric=summary["metric"],
        higher_is_better=summary.get("higher_is_better", True),
        figures={figure.key: summary.get(figure.key) for figure in FIGURES},
        cost={
            "units": cost.get("units", 0),
            "steps": sum(stage["steps"] for stage in stages(summary)),
            "trained": cost.get("trained", 0),
            "seconds": summary["seconds"],
        },
        curve=tuple(fmean(row) for row in seen if row),
    )


def _devices() -> list[str]:
    """Return the names of the GPUs that runs may use; [] without any."""
    import torch

    if not torch.cuda.is_available():
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(k) for k in range(torch.cuda.device_count())]
