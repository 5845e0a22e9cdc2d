"""Checkpoints on disk: whole folders, written under a temporary name, verified before use.

A checkpoint is ``checkpoints/step-NNNNNNNN/`` with a file per rank, shared files from rank 0, and
``manifest.json``, which has the size and SHA-256 of each. It is written into a folder whose name
begins with ``.partial-`` and renamed when every file is on disk; so what has the final name is
whole. Files are loaded with ``weights_only=True``: tensors and plain values, nothing executable.
What cannot be used, or is later than where a run goes on from, is renamed to ``aside-step-…``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from distcl.config.files import file_digest, sync_to_disk
from distcl.distributed.runtime import Runtime
from distcl.errors import CheckpointError

SCHEMA = 3
MANIFEST = "manifest.json"
MODEL = "model.safetensors"
SHARED = "shared.pt"
_PARTIAL = ".partial-"
_OLD = ".old-"
_ASIDE = "aside-"


def rank_file(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank-{rank:05d}.pt"


@dataclass
class _Writing:
    """A checkpoint on its way to the disk: the thread that writes, and what came of it."""

    step: int
    partial: Path
    meta: dict[str, Any]
    thread: threading.Thread = field(init=False)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str = "its writer ended early"


class CheckpointStore:
    """The checkpoints of a run. Methods are collective unless they say otherwise.

    ``keep``: how many of the newest stay; the one of the best ``score`` stays too. ``warn`` takes
    one line on rank 0. ``published`` is called there with the path of each that is finished.
    """

    def __init__(
        self,
        runtime: Runtime,
        folder: Path,
        keep: int,
        warn: Callable[[str], None],
        published: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self._runtime = runtime
        self.folder = folder
        self._keep = keep
        self._warn = warn
        self._published = published
        self._writing: _Writing | None = None
        self.failure = ""
        """Why the last checkpoint was not written; '' if it was."""

    def save(
        self,
        step: int,
        mine: Mapping[str, Any],
        shared: Mapping[str, Any],
        model: Mapping[str, torch.Tensor],
        meta: Mapping[str, Any],
    ) -> None:
        """Begin to write a checkpoint; returns when everything is copied to CPU memory.

        ``mine``: this rank's state; ``shared`` and ``model``: rank 0's are written. ``meta`` goes
        into the manifest; ``meta["score"]`` (a number or None) tells the best one: the largest,
        or the smallest where ``meta["higher_is_better"]`` is there and false; ``meta["header"]``,
        if there, stands in the header of the weights' file. Call
        :meth:`poll` until it is finished. One that is still being written is finished first.
        """
        self.finish()
        partial = self.folder / f"{_PARTIAL}{step:08d}"
        writing = _Writing(step, partial, dict(meta))
        files: dict[str, Any] = {rank_file(self._runtime.rank): copied(mine)}
        if self._runtime.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            files[SHARED] = copied(shared)
            files[MODEL] = copied(model)
        self._runtime.barrier()
        writing.thread = threading.Thread(target=_write, args=(writing, files), daemon=True)
        writing.thread.start()
        self._writing = writing

    @property
    def pending(self) -> bool:
        """Whether a checkpoint waits for its name; the same on every rank. Local."""
        return self._writing is not None

    @property
    def written(self) -> bool:
        """Whether this rank has nothing (more) to write. Local."""
        return self._writing is None or not self._writing.thread.is_alive()

    def finish(self) -> bool:
        """Wait for the checkpoint being written, and give it its name.

        Returns whether it is good (True if there was none). If a rank could not write, ``warn``
        tells why and the folder goes; older checkpoints stay.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return True
        writing.thread.join()
        found = self._runtime.gather_objects((writing.files, writing.error))
        failed = [f"rank {r}: {e}" for r, (_, e) in enumerate(found) if e]
        if self._runtime.is_main and not failed:
            files = {name: entry for part, _ in found for name, entry in part.items()}
            failed = self._publish(writing, files)
        if self._runtime.is_main and failed:
            shutil.rmtree(writing.partial, ignore_errors=True)
            self._warn(f"the checkpoint of step {writing.step} was not written ({failed[0]})")
        failed = self._runtime.broadcast(failed)
        self.failure = failed[0] if failed else ""
        return not failed

    def _publish(self, writing: _Writing, files: dict[str, Any]) -> list[str]:
        """Write the manifest, sync, rename, and drop what is no longer kept. Local to rank 0."""
        manifest = {
            "schema": SCHEMA,
            "step": writing.step,
            "world_size": self._runtime.world_size,
            **writing.meta,
            "files": files,
        }
        final = self.folder / f"step-{writing.step:08d}"
        try:
            path = writing.partial / MANIFEST
            text = json.dumps(sealed(manifest), indent=1, allow_nan=False)
            path.write_text(text, encoding="utf-8")
            sync_to_disk(path)
            sync_to_disk(writing.partial)
            old = self.folder / f"{_OLD}{final.name}"
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():  # one of the same step, from before the run was resumed
                _rename(final, old)
            _rename(writing.partial, final)
            sync_to_disk(self.folder)
        except OSError as error:
            return [f"rank 0: {error.strerror or error}"]
        shutil.rmtree(old, ignore_errors=True)
        self._published(final)
        self._prune()
        return []

    def _prune(self) -> None:
        kept = self.all()
        scores = {path: score for path in kept if (score := _score(path)) is not None}
        best = max(scores, key=lambda p: (scores[p], p.name)) if scores else None
        for path in kept[: -self._keep]:
            if path != best:
                shutil.rmtree(path, ignore_errors=True)

    def all(self) -> list[Path]:
        """Return every finished checkpoint, oldest first. Local."""
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def clean(self) -> None:
        """Remove what an interrupted writer left. Local to rank 0; call before the first save."""
        for path in self.folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)
        for old in self.folder.glob(f"{_OLD}*"):
            final = self.folder / old.name.removeprefix(_OLD)
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:  # the writer was about to replace it
                _rename(old, final)

    def newest(self) -> Path | None:
        """Return the newest checkpoint that verifies, None if there are none at all.

        ``warn`` tells of those that do not verify. Raises CheckpointError if no one does, on every
        rank: to begin anew then is the user's decision.
        """
        found = self._runtime.broadcast(self.all())
        try:
            return newest_good(found, self._warn, self._runtime)[0] if found else None
        except CheckpointError as error:
            raise CheckpointError(f"{error}, or begin anew with --overwrite") from error

    def go_on_from(self, step: int) -> None:
        """Set aside every checkpoint later than ``step``. Local to rank 0.

        They are damaged, or of a future that will not be; left in place they would be taken for
        the newest.
        """
        for path in self.all():
            if path.name > f"step-{step:08d}":
                aside = self.folder / f"{_ASIDE}{path.name}"
                shutil.rmtree(aside, ignore_errors=True)
                _rename(path, aside)


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with the SHA-256 of itself without it, as JSON with sorted keys."""
    plain = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(plain, sort_keys=True)
    return plain | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest. Raises CheckpointError naming what is wrong. Local."""
    manifest_path = path / MANIFEST
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise CheckpointError(f"checkpoint '{manifest_path}' cannot be read: {reason}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"checkpoint '{manifest_path}' is not a manifest")
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(
            f"checkpoint '{path}' has schema {manifest.get('schema')}; this version reads {SCHEMA}"
        )
    if sealed(manifest)["sha256"] != manifest.get("sha256"):
        raise CheckpointError(f"checkpoint '{manifest_path}' is damaged: its SHA-256 differs")
    world, step = manifest.get("world_size"), manifest.get("step")
    if not (type(world) is int and type(step) is int and world > 0 <= step):
        raise CheckpointError(f"checkpoint '{manifest_path}' has no step or no world_size")
    files = manifest["files"]
    for name in files:
        if Path(name).name != name or "\0" in name or (path / name).is_symlink():
            raise CheckpointError(f"checkpoint '{path}' names a file outside itself: '{name}'")
    ranks = (rank_file(rank) for rank in range(min(world, len(files))))
    if missing := sorted({MODEL, SHARED, *ranks} - files.keys()):
        raise CheckpointError(f"checkpoint '{manifest_path}' does not list '{missing[0]}'")
    if not isinstance(manifest.get("config"), dict):
        raise CheckpointError(f"checkpoint '{manifest_path}' has no configuration")
    return manifest


def verify(path: Path, runtime: Runtime | None = None) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest, and return that.

    Collective with a ``runtime``: each file is read by one rank, a fault is told on all. Raises
    CheckpointError naming the first file that is missing, of the wrong size, or changed.
    """
    manifest: dict[str, Any] = {}
    fault = ""
    try:
        manifest = read_manifest(path)
        for name, entry in _share(manifest["files"], runtime):
            _check_file(path / name, entry)
    except CheckpointError as error:
        fault = str(error)
    faults = [fault] if runtime is None else runtime.gather_objects(fault)
    if fault := next(filter(None, faults), ""):
        raise CheckpointError(fault)
    return manifest


def newest_good(
    found: Sequence[Path], warn: Callable[[str], None], runtime: Runtime | None = None
) -> tuple[Path, dict[str, Any]]:
    """Return the last checkpoint of ``found`` that verifies, and its manifest.

    Collective with a ``runtime``, all ranks giving the same ``found``. ``warn`` tells of those
    after it. Raises CheckpointError if none verifies.
    """
    faults: list[str] = []
    for path in reversed(found):
        try:
            manifest = verify(path, runtime)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            warn(f"{fault}; falling back to the one before")
        return path, manifest
    raise CheckpointError(
        f"no checkpoint in '{found[-1].parent}' can be used: {faults[0]}; restore one from a copy"
    )


def _share(files: dict[str, Any], runtime: Runtime | None) -> list[tuple[str, Any]]:
    """Return the files that this rank reads: the largest go first, each to who has least."""

    def size(name: str) -> int:
        entry = files[name]
        found = entry.get("bytes") if isinstance(entry, dict) else 0
        return found if type(found) is int else 0

    loads = [0] * (1 if runtime is None else runtime.world_size)
    mine: list[tuple[str, Any]] = []
    for name in sorted(files, key=lambda name: (-size(name), name)):
        rank = loads.index(min(loads))
        loads[rank] += size(name)
        if runtime is None or rank == runtime.rank:
            mine.append((name, files[name]))
    return mine


def _check_file(file: Path, entry: Any) -> None:
    name = file.name
    if not isinstance(entry, dict):
        raise CheckpointError(f"checkpoint '{file.parent}' has no size of '{name}'")
    if not file.is_file():
        raise CheckpointError(f"checkpoint file '{file}' is missing")
    if file.stat().st_size != entry.get("bytes"):
        raise CheckpointError(
            f"checkpoint file '{file}' has {file.stat().st_size} bytes, not {entry.get('bytes')}"
        )
    if file_digest(file) != entry.get("sha256"):
        raise CheckpointError(f"checkpoint file '{file}' is damaged: its SHA-256 differs")


def load(path: Path) -> Any:
    """Read one file of a checkpoint: tensors and plain values only. Local.

    Tensors lie in the file, memory-mapped: of those that are not looked at nothing is read, and
    :func:`copied` takes out what must outlive it.
    """
    try:
        if path.name == MODEL:
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever the readers raise on a damaged file
        raise CheckpointError(f"checkpoint file '{path}' cannot be read: {error}") from error


def _write(writing: _Writing, files: Mapping[str, Any]) -> None:
    try:
        writing.partial.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            path = writing.partial / name
            if name == MODEL:
                save_file(content, str(path), writing.meta.get("header") or None)
            else:
                torch.save(content, path)
            sync_to_disk(path)
            writing.files[name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        writing.error = ""
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, in three libraries
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        writing.error = reason.splitlines()[0]


def copied(value: Any) -> Any:
    """Copy tensors to CPU memory, out of what training changes or a file that may go. Local."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [copied(v) for v in value]
    return value


def _rename(path: Path, to: Path) -> None:
    path.rename(to)


def _score(path: Path) -> float | None:
    """Return how good a checkpoint is: larger is better; None if that is not known."""
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return None
    score, sign = manifest.get("score"), 1 if manifest.get("higher_is_better", True) else -1
    return sign * float(score) if isinstance(score, int | float) else None
