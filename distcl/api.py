"""The commands as functions: what a script or a notebook calls, and the command line too."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distcl.config.load import Given, Overrides, load_config
from distcl.config.paths import expanded

if TYPE_CHECKING:
    from distcl.job import Command
    from distcl.types import Progress


def train(
    config: Given,
    out: str | Path | None = None,
    resume: str = "never",
    overrides: Overrides = (),
    allow_changed: Collection[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train one round per experience, as ``distcl train`` does; return what summary.json holds.

    Collective: under a launcher every rank calls it, and all get the same summary.

    Args:
        config: a TOML file, a dict of sections (``{"optimizer": {"lr": 0.1}}``), or a Config.
        out: the run folder. Default: ``run.out``, else runs/NAME-OF-CONFIG (runs/train of what is
            no file), then -2, -3, …; the last of them with ``resume="auto"``.
        resume: "auto" goes on from the newest good checkpoint in the run folder, if there is one;
            the path of a checkpoint goes on from that one; "never" begins anew, in a folder that
            holds no run.
        overrides: values by key, ``{"optimizer.lr": 0.1}``, or texts as after ``--set``.
        allow_changed: keys that may differ from the checkpoint's, and "data".
        overwrite: replace the run that the folder holds.
        progress: told, on rank 0, how far it is.

    Raises:
        DistclError: in the classes of ``distcl.errors``, one or two lines that name the culprit.
    """
    return start("train", config, out, resume, overrides, allow_changed, overwrite, progress)


def run(
    config: Given,
    out: str | Path | None = None,
    resume: str = "never",
    overrides: Overrides = (),
    allow_changed: Collection[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Watch the stream and run a round whenever drift is detected, as ``distcl run`` does.

    Arguments, result and errors are those of :func:`train`.
    """
    return start("run", config, out, resume, overrides, allow_changed, overwrite, progress)


def detect(
    config: Given,
    out: str | Path | None = None,
    resume: str = "never",
    overrides: Overrides = (),
    allow_changed: Collection[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Watch the stream and report drift, without rounds of training, as ``distcl detect`` does.

    Arguments, result and errors are those of :func:`train`.
    """
    return start("detect", config, out, resume, overrides, allow_changed, overwrite, progress)


def start(
    command: Command,
    config: Given,
    out: str | Path | None = None,
    resume: str = "never",
    overrides: Overrides = (),
    allow_changed: Collection[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run a command by its name; see :func:`train`. Collective.

    ``tell``: see :func:`distcl.job.execute`.
    """
    loaded = load_config(config, overrides)
    name = expanded(config).stem if isinstance(config, str | Path) else command
    given = out or loaded.run.out
    folder = expanded(given) if given else Path("runs", name)
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
        numbered=not given,
    )
