"""What a run's weights say of held-out samples, one row each, in a file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from distcl.checkpoint.export import assemble_trained, configuration
from distcl.config import Config, StreamConfig
from distcl.config.files import write_atomically
from distcl.data.stream import create_stream
from distcl.distributed.runtime import Runtime
from distcl.errors import ConfigError, DataError, UsageError
from distcl.losses import bce, class_scores, judged_by
from distcl.parallel.inference import ShardedForward
from distcl.registry import nearest, resolve
from distcl.types import Batch, DataSpec, Ids, PyTree, Stream, info_of

What = Literal["logits", "probs", "labels", "embedding"]

log = logging.getLogger("distcl")


def write_predictions(
    path: Path,
    out: Path,
    what: What = "logits",
    data: StreamConfig | None = None,
    warn: Callable[[str], None] = log.warning,
) -> tuple[int, Path]:
    """Write :func:`predictions_of` to a file; return N and the file of the weights. Collective.

    Only rank 0 keeps the outputs on the way.
    """
    arrays, weights = predictions_of(path, what, data, None, out, warn=warn)
    return len(arrays["ids"]), weights


def predictions_of(
    path: Path,
    what: What = "logits",
    data: StreamConfig | None = None,
    config: Config | None = None,
    out: Path | None = None,
    drop: Collection[str] = (),
    warn: Callable[[str], None] = log.warning,
) -> tuple[dict[str, npt.NDArray[Any]], Path]:
    """Return what a run's weights say of the held-out samples of every experience. Collective.

    ``data``: another stream than the run's; its samples are read as the run's ``[data]`` says.
    ``config``: the run's, with its objects; None: what the folder holds. The arrays, without those
    that ``drop`` names, are ids int64 [N], experience int64 [N] (from 1), outputs [N, ...] as
    ``what`` says, and y [N, ...] where it is one tensor; in the order of experiences, and the same
    on every rank, at any number of ranks. ``probs`` and ``labels`` of several positions have the
    classes last; of ``bce`` they are of each label. ``embedding`` is the input of
    the linear layer that runs last. Rank 0 writes them to ``out``, .npz or .parquet (lists); other
    ranks then have the ids alone. ``warn``: see :func:`distcl.checkpoint.export.find`.

    Returns them and the file of the weights. Raises UsageError if ``out`` is there, or neither;
    ConfigError if ``what`` is not defined on the outputs; DataError where samples do not fit.
    """
    if what not in (known := get_args(What)):
        near = nearest(str(what), known)
        raise UsageError(f"what = {what!r}{near}; there are {', '.join(known)}")
    if out is not None and out.suffix not in (".npz", ".parquet"):
        raise UsageError(f"'{out}' must end in .npz or .parquet")
    if out is not None and out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UsageError(f"'{out}' needs the package 'pyarrow'; type: pip install pyarrow")
    config = config or configuration(path)
    runtime = Runtime(config.run, config.parallel, config.training)
    with runtime.guard():
        fault = ""
        if out is not None and out.exists():
            fault = f"'{out}' exists; give another file"
        elif out is not None and not out.parent.is_dir():
            fault = f"there is no folder '{out.parent}' to write '{out.name}' in"
        if fault := runtime.broadcast(fault):
            raise UsageError(fault)
        parts, config, weights = assemble_trained(path, config, runtime, warn)
        stream: Stream = parts.stream
        say = _meaning(what, config.model.loss, stream.spec)
        if "y" in drop:  # it is not known, but how classes lie goes by its shape
            meaning, shape = say, tuple(stream.spec.y_shape)
            say = lambda logits, y: meaning(logits, logits.new_zeros(len(logits), *shape))  # noqa: E731
        if data is not None:
            stream = create_stream(data, config.run.seed, config.data)
            _check_fit(stream, parts.stream)
        size = config.training.eval_batch_size
        found: dict[str, list[Any]] = {}
        seen: list[torch.Tensor] = []
        if what == "embedding":
            seen, say = _watched_inputs(parts.forward.module), lambda logits, y: seen[0]
        for experience in stream.experiences:
            columns = _predicted(parts.forward, stream, experience.test, size, say)
            columns["experience"] = torch.full_like(columns["ids"], experience.index + 1)
            for name, values in columns.items():
                if name not in drop and (name == "ids" or out is None or runtime.is_main):
                    found.setdefault(name, []).append(values.cpu().numpy())
        arrays = {name: np.concatenate(some) for name, some in found.items()}
        if out is not None and runtime.is_main:
            write_atomically(out, lambda part: _save(out, part, arrays))
    return arrays, weights


def _predicted(
    forward: ShardedForward,
    stream: Stream,
    ids: Ids,
    size: int,
    say: Callable[[torch.Tensor, PyTree], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return ids [N], outputs [N, ...] and perhaps y [N, ...] of samples. Collective."""
    expected: dict[str, torch.Size] = {}

    def measure(batch: Batch) -> dict[str, torch.Tensor]:
        logits = forward.logits(batch)
        if not isinstance(logits, torch.Tensor):
            raise ConfigError(
                f"the model returns a {type(logits).__name__}; only outputs that are one tensor "
                "can be written"
            )
        if logits.is_floating_point():
            logits = logits.to(forward.runtime.dtype)
        outputs = say(logits, batch.y)
        if outputs.is_floating_point():
            outputs = outputs.to(forward.runtime.dtype)
        columns = {"ids": batch.ids.to(logits.device), "outputs": outputs}
        if isinstance(batch.y, torch.Tensor):
            columns["y"] = batch.y
        for name, values in columns.items():
            here = values.shape[1:]
            if here != expected.setdefault(name, here):
                raise DataError(
                    f"{name} of samples have unequal shapes, {list(expected[name])} and "
                    f"{list(here)}: cut texts to one length (source 'text' with pack)"
                )
        return columns

    # on all ranks the first sample's shapes are those that others are compared with
    forward.per_batch(stream, ids[:1], 1, measure, sync=False)
    return forward.per_batch(stream, ids, size, measure, sync=False)


def _watched_inputs(module: nn.Module) -> list[torch.Tensor]:
    """Return where, after each forward, the input [B, ...] of the linear layer run last is."""
    seen: list[torch.Tensor] = []

    def see(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen[:] = args[:1] or [named["input"]]

    every = module.named_modules()
    layers = [one for n, one in every if isinstance(one, nn.Linear) and ".lora_" not in n]
    if not layers:
        raise ConfigError("--what embedding is the input of the last linear layer; there is none")
    for layer in layers:
        layer.register_forward_pre_hook(see, with_kwargs=True)
    return seen


def _meaning(
    what: What, loss: str, spec: DataSpec
) -> Callable[[torch.Tensor, PyTree], torch.Tensor]:
    """Return what makes (logits, y) what is asked for; ConfigError where it has no meaning."""
    if what in ("logits", "embedding"):
        return lambda logits, y: logits
    if judged_by(loss, spec) == "r2":
        raise ConfigError(
            f"there are no {what} in regression (model.loss = '{loss}'); --what logits writes the "
            "predicted values"
        )
    if resolve("loss", loss) is bce:
        if what == "probs":
            return lambda logits, y: logits.sigmoid()
        return lambda logits, y: (logits > 0).long()
    if what == "probs":
        return lambda logits, y: class_scores(logits, y, loss).softmax(-1)
    return lambda logits, y: class_scores(logits, y, loss).argmax(-1)


def _check_fit(stream: Stream, own: Stream) -> None:
    """Raise DataError if samples are of another shape, or have other tokens, than the run's own."""
    given, known = stream.spec, own.spec
    varies = info_of(stream).varies or info_of(own).varies
    if given.x_shape != known.x_shape and not varies:
        raise DataError(
            f"samples of --data have shape {list(given.x_shape)}, but the run's model was trained "
            f"on {list(known.x_shape)}"
        )
    if given.tokens > known.tokens > 0:
        raise DataError(
            f"samples of --data have tokens up to {given.tokens - 1}, but the run's model knows "
            f"{known.tokens}"
        )


def _save(out: Path, part: Path, arrays: dict[str, Any]) -> None:
    if out.suffix == ".parquet":
        pa, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
        columns = {name: _column(pa, values) for name, values in arrays.items()}
        parquet.write_table(pa.table(columns), part)
        return
    with part.open("wb") as file:  # of a path, savez would change the name
        np.savez(file, **arrays)


def _column(pa: Any, values: npt.NDArray[Any]) -> Any:
    """Return an array [N, ...] as a column: of numbers, of lists, of lists of lists, …."""
    column = pa.array(np.ascontiguousarray(values).reshape(-1))
    for size in reversed(values.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column
