"""The commands as functions: what a script or a notebook calls, and the command line too."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from distcl import registry
from distcl.config import Config
from distcl.config.load import Given, Overrides, load_config
from distcl.config.paths import expanded
from distcl.errors import ConfigError

if TYPE_CHECKING:
    from distcl.job import Command
    from distcl.types import Progress

P = ParamSpec("P")
R = TypeVar("R")

Part = Callable[..., Any] | str
"""An object that is a part, or the name of one."""

PARTS = {
    "model": "model.name",
    "source": "stream.source",
    "loss": "model.loss",
    "optimizer": "optimizer.name",
    "score": "model.score",
    "updater": "continual_learning.update_mode",
    "signal": "priority.signal",
}
"""The keys of the parts that may be objects, by kind."""


def start(  # noqa: D417 the command is for those below
    command: Command,
    config: Given = None,
    out: str | Path | None = None,
    resume: str = "never",
    overrides: Overrides = (),
    allow_changed: Collection[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
    *,
    model: Part | None = None,
    stream: Sequence[Any] | Part | None = None,
    loss: Part | None = None,
    optimizer: Part | None = None,
    score: Part | Sequence[Part] | None = None,
    updater: Part | None = None,
    signal: Part | None = None,
    callbacks: Sequence[object] | None = (),
) -> dict[str, Any]:
    """Return what summary.json holds.

    Collective: under a launcher every rank calls it, and all get the same summary. Objects in place
    of names are parts as docs/EXTENDING.md has them; the configuration holds their class, and who
    goes on with the run gives them again.

    Args:
        config: a TOML file, a dict of sections (``{"optimizer": {"lr": 0.1}}``), or a Config.
        out: the run folder. Default: ``run.out``, else runs/NAME-OF-CONFIG (runs/COMMAND of what is
            no file), then -2, -3, …; the last of them with ``resume="auto"``.
        resume: "auto" goes on from the newest good checkpoint in the run folder, if there is one;
            the path of a checkpoint goes on from that one; "never" begins anew, in a folder that
            holds no run.
        overrides: values by key, ``{"optimizer.lr": 0.1}``, or texts as after ``--set``.
        allow_changed: keys that may differ from the checkpoint's, and "data".
        overwrite: replace the run that the folder holds.
        progress: told, on rank 0, how far it is.
        tell: told, on rank 0, that another rank failed, before the process exits.
        model: a torch.nn.Module, of which each run trains a copy (of rank 0's), or a function of
            the :class:`distcl.types.DataSpec` that returns one.
        stream: a list of (train, held-out) map-style datasets of (x, y), one an experience; its
            drift is none unless ``stream.drift`` is given. Or a function of the ``[stream]``
            section that returns two sources.
        loss: a function (outputs, y) -> [B] without reduction.
        optimizer: a function of the list of parameters; ``optimizer.lr`` and its like are its own.
        score: a function (outputs, y) -> [B], a :class:`distcl.training.scores.Score`, or several.
        updater: a :class:`distcl.updaters.Updater`, the class.
        signal: a class, or function, that makes a :class:`distcl.types.PrioritySignal`.
        callbacks: objects with methods of :class:`distcl.Callback`.

    Raises:
        DistclError: in the classes of ``distcl.errors``, one or two lines that name the culprit.
    """
    named = expanded(config).stem if isinstance(config, str | Path) else command
    given = {"model": model, "source": stream, "loss": loss, "optimizer": optimizer}
    given |= {"score": score, "updater": updater, "signal": signal}
    with with_parts(load_config(config, overrides), given) as loaded:
        refuse_absent(loaded)
        chosen = out or loaded.run.out
        folder = expanded(chosen) if chosen else Path("runs", named)
        loaded = loaded.replace(**{"run.out": str(folder)})

        from distcl import job  # what is wrong so far is told before torch is imported

        return job.execute(
            command,
            loaded,
            folder,
            progress,
            tell,
            resume,
            allow_changed,
            overwrite,
            numbered=not chosen,
            callbacks=callbacks or (),
        )


def refuse_absent(config: Config) -> None:
    """Raise ConfigError naming an object that the configuration names and nobody has given."""
    for kind, key in PARTS.items():
        section, _, name = key.partition(".")
        now = getattr(getattr(config, section), name)
        for one in [now] if isinstance(now, str) else now:
            if one.startswith(registry.OBJECT):
                registry.resolve(kind, one)


@contextmanager
def with_parts(config: Config, given: Mapping[str, Any]) -> Iterator[Config]:
    """Give the configuration that names these parts, objects or names by kind; None: its own.

    Objects are known by their names inside. Raises ConfigError where they do not fit it.
    """
    held: list[tuple[str, str, Any]] = []
    values: dict[str, Any] = {}
    for kind, part in given.items():
        if part is None:
            continue
        several = isinstance(part, Sequence) and not isinstance(part, str)
        if several and kind == "source":
            from distcl.data.pairs import source_of

            said = config.stream.experiences
            if "experiences" in config.stream.model_fields_set and said != len(part):
                raise ConfigError(
                    f"stream.experiences = {said!r}, but stream= has {len(part)} pairs; leave it "
                    "out"
                )
            values["stream.experiences"] = len(part)
            if "drift" not in config.stream.model_fields_set:
                values["stream.drift"] = "none"
            part, several = source_of(part), False
        if several and (kind not in ("score", "source") or not part):
            most = "at least one object" if kind == "score" else "one object"
            raise ConfigError(
                f"{PARTS[kind]}: give {most}, not a {type(part).__name__} of {len(part)}"
            )
        for one in part if several else [part]:
            if not (isinstance(one, str) or callable(one)):
                raise ConfigError(f"{PARTS[kind]}: {type(one).__name__} is not callable")
            held.append((kind, PARTS[kind], one))
    objects = [(kind, one) for kind, _, one in held if not isinstance(one, str)]
    with registry.objects(objects) as names:
        named = iter(names)
        for _, key, one in held:
            name = one if isinstance(one, str) else next(named)
            values[key] = [*values[key], name] if key in values else [name]
        for key, some in values.items():
            if isinstance(some, list) and (key != "model.score" or len(some) == 1):
                values[key] = some[0]
        config = config.replace(**values)
        yield config


def _command(
    name: Command, does: str, function: Callable[Concatenate[Command, P], R]
) -> Callable[P, R]:
    """Return ``function`` as a command of its own, which ``help`` shows with its arguments."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(name, *args, **kwargs)

    whole = inspect.signature(function)
    call.__signature__ = whole.replace(parameters=[*whole.parameters.values()][1:])  # type: ignore[attr-defined]
    call.__name__ = call.__qualname__ = name
    call.__doc__ = (function.__doc__ or "").replace("Return what", f"{does}; return what", 1)
    return call


train = _command("train", "Train one round per experience, as ``distcl train`` does", start)
run = _command("run", "Watch the stream, a round on each drift, as ``distcl run`` does", start)
detect = _command("detect", "Watch the stream and report drift, as ``distcl detect`` does", start)
