"""Random combinations of parts and sizes, each run on 1, 2 and 3 ranks: is it the same run?

A combination is a configuration, drawn from a seed and its number. It runs by the command line in
real processes, in fp64, on uneven parts. It ends as

- equal: every number of ranks ended with code 0, the same draws in every round, and weights,
  accuracies, priorities and counts equal to 1e-9; and where it says so, a run that went on from a
  checkpoint in mid-round is the one that nobody interrupted, bit for bit on as many ranks;
- refused: every number of ranks ended with code 2 or 3 and the same sentence, but for numbers in
  it, and with code 2 before anything was trained;
- wrong, hung (a process did not end within the limit) or crashed: anything else.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tomlkit
from safetensors.numpy import load_file

from distcl import registry
from tests.forked import Ended, Started
from tests.samples import samples, write_shards

LIMIT = 150.0
"""Seconds after which processes count as hung, and three times what fewer ranks took."""

KEYED = {"stream.options": {"experiences": "key:site"}, "stream.drift": "none"}
SHARDED = {"stream.options": {"experiences": "shards"}, "stream.drift": "none"}
SOURCES: dict[str, dict[str, Any]] = {
    "digits": {"stream.source": "digits", "stream.samples_per_experience": 151},
    "arrays": {"stream.source": "arrays", "stream.path": "arrays.npz"},
    "arrays in order": {
        **{"stream.source": "arrays", "stream.path": "arrays.npz", "stream.drift": "none"},
        "stream.options": {"experiences": "order"},
    },
    "npy files": {"stream.source": "arrays", "stream.path": "."},
    "hf": {"stream.source": "hf", "stream.path": "hf"},
    "shards": {"stream.path": "shards", "data.access": "indexed"},
    "shards, streamed": {"stream.path": "shards", "data.access": "stream"},
    "shards by site": {"stream.path": "shards", **KEYED},
    "shards by shard": {"stream.path": "shards", **SHARDED},
    "shards by shard, streamed": {"stream.path": "shards", "data.access": "stream", **SHARDED},
    "damaged shards": {"stream.path": "damaged", "data.access": "indexed"},
    "damaged shards, streamed": {"stream.path": "damaged", "data.access": "stream"},
}
"""Keys of each source; paths are relative to the folder that :func:`make_data` fills."""


def make_data(folder: Path) -> None:
    """Write what the sources read into a folder that may exist."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = samples()
    np.savez(folder / "arrays.npz", x=images, y=labels)
    np.save(folder / "x.npy", images)
    np.save(folder / "y.npy", labels)
    write_shards(folder / "shards")
    write_shards(folder / "damaged", broken=(3, 77, 130, 180, 229, 301))
    try:
        import datasets
    except ImportError:
        return  # the source is refused, and says why
    datasets.disable_progress_bars()
    split = datasets.Dataset.from_dict({"image": images, "label": labels})
    split.save_to_disk(str(folder / "hf"))


# ---------------------------------------------------------------- a combination


@dataclass(frozen=True)
class Combination:
    """A command with its configuration, and from which ranks to which it is resumed, if it is."""

    command: str
    source: str
    keys: dict[str, Any]
    resume: tuple[int, int] | None

    @property
    def toml(self) -> str:
        """The configuration as a file."""
        sections: dict[str, dict[str, Any]] = {}
        for dotted, value in self.keys.items():
            section, _, key = dotted.partition(".")
            sections.setdefault(section, {})[key] = value
        return tomlkit.dumps(sections)

    def __str__(self) -> str:
        names = ("continual_learning.update_mode", "priority.source", "priority.signal")
        names = (*names, "priority.draw", "priority.target")
        parts = [self.command, self.source, *(str(self.keys[name]) for name in names)]
        if self.resume:
            parts.append(f"resumed {self.resume[0]}>{self.resume[1]}")
        return ", ".join(parts)


def names(kind: str) -> list[str]:
    return [part.name for part in registry.parts(kind)]


def draw(seed: int, number: int, data: Path, ranks: Sequence[int]) -> Combination:
    """Draw a combination; sources, updaters and signals go round with its number."""
    random = Random(f"{seed} {number}")

    def one_of(kind: str, all_of: list[str]) -> str:
        """Return each in turn, in another order every time round."""
        again, place = divmod(number, len(all_of))
        return Random(f"{seed} {kind} {again}").sample(all_of, len(all_of))[place]

    def likely(chance: float) -> bool:
        return random.random() < chance

    pick = random.choice
    source = one_of("source", list(SOURCES))
    updater = one_of("updater", [n for n in names("updater") if n != "jvp_penalty"])
    signal = one_of("signal", names("signal"))
    streamed = "streamed" in source
    where = "score" if streamed else pick(("score", "candidates", "online"))
    if where == "online" and signal in ("loss_delta", "disagreement") and likely(0.9):
        signal = pick(("entropy", "loss", "grad_norm", "fisher"))
    draws = ["multinomial", "systematic", "without_replacement"]
    if (streamed or where == "online") and likely(0.9):
        draws = ["systematic"] if streamed else draws[:2]
    mlp = likely(0.7)
    keys: dict[str, Any] = {
        "run.precision": "fp64",
        "run.report": False,
        "run.seed": random.randrange(1000),
        "run.poll_steps": pick((3, 20)),
        "checkpoint.every_round": False,
        "checkpoint.every_minutes": 0.0,
        "stream.source": "shards",
        "stream.experiences": 3,
        "stream.drift": pick((*names("drift"), ["noise", "permute"])),
        "model.name": "mlp" if mlp else "cnn",
        "model.options": {"hidden": [13]} if mlp else {"channels": [4, 4, 8]},
        "optimizer.lr": 0.02,
        "training.epochs": pick((1, 1, 2)),
        "training.pretrain_epochs": pick((0, 1)),
        "training.batch_size": pick((7, 17, 23, 32, 50)),
        "continual_learning.update_mode": updater,
        "continual_learning.importance_weighting": likely(0.9),
        "continual_learning.mix_historic_data": likely(0.5),
        "priority.signal": signal,
        "priority.source": where,
        "priority.draw": pick(draws),
        "priority.target": pick(("auto", "current", "history", "union")),
        "priority.score_batch": pick((16, 37, 512)),
        **SOURCES[source],
    }
    if "stream.path" in keys:
        keys["stream.path"] = str(data / keys["stream.path"])
    if "damaged" in source:
        keys["data.on_bad_sample"] = pick(("skip", "skip", "error"))

    def maybe(chance: float, key: str, *values: Any) -> None:
        if likely(chance):
            keys[key] = pick(values)

    if keys["continual_learning.mix_historic_data"]:
        maybe(0.7, "continual_learning.current_ratio", 0.5, 0.3, 0.77, 0.9)
    maybe(0.6, "continual_learning.importance_alpha", 0.5, 2.0, 0.0)
    maybe(0.5, "continual_learning.buffer_size", 30, 57, 5)
    maybe(0.25, "continual_learning.history_store", "copy")
    maybe(0.4, "continual_learning.replay_batch_size", 11, 40, 3)
    maybe(0.4, "training.accumulate", 2, 3, 5)
    maybe(0.2, "training.accept", "improves")
    maybe(0.2, "training.eval_batch_size", 7)
    maybe(0.2, "training.steps_per_round", 5, 11)
    maybe(0.3, "training.clip_norm", 0.5)
    maybe(0.2, "stream.transition_fraction", 0.25)
    maybe(0.15, "stream.recurring", 2)
    maybe(0.15, "stream.samples_per_experience", 40)
    maybe(0.25, "data.workers", 1, 2)
    maybe(0.3, "priority.min_ess", 0.5, 0.9, 1.0)
    maybe(0.2, "priority.cap", 1.0, 3.0)
    maybe(0.2, "priority.floor", 0.2, 1.0)
    maybe(0.15, "priority.max_replay", 0.5, 2.0)
    maybe(0.2, "optimizer.between_rounds", "reset")
    maybe(0.3, "optimizer.decay", "linear", "cosine")
    maybe(0.3, "optimizer.warmup_steps", 3)
    maybe(0.15, "parallel.anchor_device", "cpu")
    if likely(0.3):
        keys |= {"optimizer.name": pick(("adam", "adamw")), "optimizer.lr": 0.003}
    else:
        maybe(0.4, "optimizer.momentum", 0.9)
    weighted = where != "candidates" and keys["priority.draw"] != "without_replacement"
    maybe(0.4 if weighted else 0.02, "priority.correction", 0.5, 1.0)
    maybe(0.2 if where != "candidates" else 0.02, "priority.guard", "auto")
    if where == "online":
        keys["priority.refresh_steps"] = pick((4, 5, 7))
        maybe(0.4, "priority.pool", 9, 20)
    if streamed:
        maybe(0.5, "data.lanes", 3, 4, 5)
        maybe(0.5, "data.shuffle_buffer", 10, 64)
    if updater == "ewc_online":
        keys |= {"continual_learning.ewc_lambda": 50.0}
        keys["continual_learning.fisher_samples"] = pick((13, 1024))
    if updater == "kfac_online":
        keys |= {"continual_learning.kfac_lambda": 5.0, "continual_learning.kfac_every": 2}
    command = "run" if likely(0.15) else "train"
    if command == "run":
        keys["detector.name"] = one_of("detector", names("detector"))
        keys |= {"monitor.warmup": 20, "monitor.window": pick((100, 131)), "monitor.collect": 20}
        if keys["detector.name"] == "ensemble":
            keys["detector.options"] = {"members": ["adwin", "page_hinkley"]}
    resume = None
    if likely(0.35):
        here = max(ranks) if likely(0.6) else pick(ranks)
        resume = here, here if likely(0.7) else pick(ranks)
        keys["checkpoint.every_steps"] = pick((3, 5, 8))
        keys["checkpoint.keep"] = 1000
    maybe(0.15, "stream.general", {"source": "arrays", "path": str(data / "arrays.npz")})
    if "stream.general" in keys:
        maybe(0.4, "continual_learning.history_of", "general")
    if "optimizer.decay" in keys:
        maybe(0.5, "optimizer.min_lr", 0.001)
    return Combination(command, source, keys, resume)


# ---------------------------------------------------------------- a try


@dataclass(frozen=True)
class Result:
    """What a try came to: equal, refused, wrong, hung or crashed, and why."""

    kind: str
    why: str = ""


def attempt(what: Combination, folder: Path, ranks: Sequence[int]) -> Result:
    """Run a combination at each number of ranks, in ``folder``, and compare."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = folder / "config.toml"
    config.write_text(what.toml)

    def start(out: Path, world: int, *more: str) -> Started:
        argv = [what.command, str(config), "--out", str(out), "--quiet", *more]
        return Started(argv, folder / f"{out.name}.txt", world)

    started = {world: start(folder / f"ranks-{world}", world) for world in ranks}
    begun, ended, taken = time.monotonic(), dict[int, Ended](), 0.0
    for world, one in started.items():
        ended[world] = one.end(LIMIT + 3 * taken - (time.monotonic() - begun))
        taken = time.monotonic() - begun
    if result := judge(ended, folder):
        return result
    base = folder / f"ranks-{ranks[0]}"
    for world in ranks[1:]:
        if found := differences(base, folder / f"ranks-{world}"):
            return Result("wrong", f"{ranks[0]} and {world} ranks: {found}")
    if what.resume is None:
        return Result("equal")
    source = folder / f"ranks-{what.resume[0]}"
    saved = sorted((source / "checkpoints").glob("step-*"))
    if not saved:
        return Result("equal")
    chosen, out = Random(what.toml).choice(saved), folder / "resumed"
    shutil.copytree(chosen, out / "checkpoints" / chosen.name)
    world = what.resume[1]
    again = start(out, world, "--resume", "auto").end(LIMIT)
    where = f"resumed from {chosen.name} of {what.resume[0]} on {world} ranks"
    if result := judge({world: again}, folder, may_refuse=False):
        return Result(result.kind, f"{where}: {result.why}")
    exact = world == what.resume[0]
    if found := differences(folder / f"ranks-{world}", out, exact):
        return Result("wrong", f"{where}: {found}")
    return Result("equal")


def judge(ended: dict[int, Ended], folder: Path, may_refuse: bool = True) -> Result | None:
    """Return what ends a try: a run that did not end with 0; None if all did."""
    codes = {world: one.codes for world, one in ended.items()}
    if any(one.hung for one in ended.values()):
        return Result("hung", f"exit codes {codes}")
    found = {code for each in codes.values() for code in each}
    if found == {0}:
        return None
    texts = {world: one.text.strip() for world, one in ended.items()}
    if not found <= {0, 2, 3, 4} or "internal error" in "".join(texts.values()):
        return Result("crashed", f"exit codes {codes}: {texts}")
    sentences = {w: re.findall(r"^distcl: (.*)", text, re.M) for w, text in texts.items()}
    because = [w for w, each in codes.items() if set(each) != {0}]
    firsts = [sentences[w][0] if sentences[w] else "" for w in because]
    of_ranks = all("number of processes" in first for first in firsts)
    same = len(found) == 1 and len({kind_of(first) for first in firsts}) == 1
    if not (may_refuse and all(firsts) and (same or of_ranks)) or 4 in found:
        return Result("wrong", f"exit codes {codes}: {texts}")
    begun = [w for w in because if (folder / f"ranks-{w}" / "metrics.jsonl").exists()]
    if 2 in found and begun:
        return Result("wrong", f"refused after training had begun: {texts}")
    return Result("refused", firsts[0])


def kind_of(sentence: str) -> str:
    """Return a refusal without its numbers: which bad sample is met first depends on the ranks."""
    return re.sub(r"\d+(\.\d+)?|/\S+/", "…", re.sub(r"^rank \d+: ", "", sentence))


def differences(first: Path, second: Path, exact: bool = False) -> str:
    """Return how two runs differ, in words, or ''; ``exact``: in any bit."""
    a, b = (json.loads((out / "summary.json").read_text()) for out in (first, second))
    found = list(_unequal(_told(a), _told(b), 0.0 if exact else 1e-9))
    x, y = (load_file(out / "checkpoints" / "final.safetensors") for out in (first, second))
    if x.keys() != y.keys():
        found.append("names of weights differ")
    else:
        apart = np.array([np.abs(x[k] - y[k]).max(initial=0.0) for k in x]).max(initial=0.0)
        if not apart <= (0.0 if exact else 1e-9):  # not a number is neither
            found.append(f"weights differ by {apart:.3g}")
    return "; ".join(found[:6])


_OF_RUN = ("accuracy", "drifts", "bad_samples", "compute")
_OF_STAGE = ("draws_sha256", "steps", "accepted", "trigger", "compute", "draws", "priority")
_OF_STAGE = (*_OF_STAGE, "guard", "forward_passes_per_sample", "final_loss")


def _told(summary: dict[str, Any]) -> dict[str, Any]:
    """Return what of a summary does not depend on clocks."""
    stages = [summary["pretrain"] or {}, *summary["rounds"]]
    told = {key: summary[key] for key in _OF_RUN}
    return told | {f"round {k}": {n: s.get(n) for n in _OF_STAGE} for k, s in enumerate(stages)}


def _unequal(a: Any, b: Any, tolerance: float, name: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from _unequal(a[key], b[key], tolerance, f"{name} {key}".strip())
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _unequal(x, y, tolerance, f"{name}[{k}]")
    elif isinstance(a, float) and isinstance(b, float):
        if abs(a - b) > tolerance * max(1.0, abs(a)):
            yield f"{name}: {a!r} and {b!r}"
    elif a != b:
        yield f"{name}: {a!r} and {b!r}"
