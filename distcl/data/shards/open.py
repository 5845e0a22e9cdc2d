"""How a configuration becomes sources over shards: indexed or streamed, grouped, split."""

from __future__ import annotations

import logging
from pathlib import Path

from distcl.config import DataConfig, StreamConfig
from distcl.config.paths import reachable
from distcl.data.shards.experiences import assign_domains, assign_groups
from distcl.data.shards.index import index_path
from distcl.data.shards.indexed import ShardSource
from distcl.data.shards.manifest import MANIFEST, Manifest, read_shards
from distcl.data.shards.sequential import StreamedSource
from distcl.data.sources.grouping import held_out
from distcl.errors import ConfigError, DataError

log = logging.getLogger("distcl")


def shards(
    config: StreamConfig,
    data: DataConfig,
    experiences: str = "",
    url: str = "",
    live_seconds: float = 0.0,
) -> tuple[ShardSource, ShardSource]:
    """Return (train, test) of the folder of shards ``stream.path``, by its ``shards.json``.

    What ``distcl shard`` made of texts is read as the source of these; their domains are the
    experiences, unless ``experiences`` says otherwise. Folders without test shards hold out
    ``stream.test_fraction`` of each class; of each class of each experience, if
    ``stream.experiences`` are by key or time.

    ``experiences``: which samples make an experience. Empty: all; ``shards``: equal ranges of the
    shards, in their order; ``key:FIELD``: those of one value of a field of their JSON, in sorted
    order; ``time:FIELD``: equal numbers, in order of a field that is a number or an ISO date (test
    samples fall between the same times).

    ``url``: where the shards are, if not in the folder; see
    :class:`distcl.data.shards.sequential.StreamedSource`.

    ``live_seconds``: at the end of the stream, ``distcl run`` waits so long for another whole shard
    to be listed in ``shards.json``; it has one experience and is watched in its own order.

    Raises ConfigError or DataError.
    """
    if not config.path:
        raise ConfigError("stream.source = 'shards' needs stream.path, a folder of shards")
    folder = reachable(config.path)
    manifest = read_shards(folder)
    if not manifest.split("train"):
        raise DataError(f"'{folder / MANIFEST}' lists no shards for training")
    access = choose_access(folder, manifest, data, url)
    found: list[ShardSource] = []
    for split in ("train", "test"):
        if part := manifest.split(split):
            name, texts = f"'{folder}' ({split})", manifest.texts
            if access == "stream":
                label = manifest.label
                found.append(StreamedSource(folder, part, data, label, url, name, texts))
            else:
                found.append(ShardSource(folder, part, data, name, texts))
    if experiences and not config.stated:
        raise ConfigError(
            "stream.experiences and stream.options.experiences both say what makes an experience; "
            "leave one out"
        )
    if experiences:
        assign_groups(found, experiences, config.concepts)
    elif manifest.texts and manifest.texts.domains:
        assign_domains(found, manifest.texts, config.concepts)
    for source in found:
        source.class_names = manifest.class_names
    if len(found) == 1 and config.grouping[0] in ("key", "time"):
        *rows, infos = held_out(config, found[0].info, len(found[0]))
        found = [found[0].part(r, info) for r, info in zip(rows, infos, strict=True)]
    train, test = found if len(found) == 2 else found[0].holdout(config.test_fraction)
    if live_seconds and (config.stated != 1 or experiences):
        raise ConfigError("stream.options.live_seconds needs stream.experiences = 1")
    train.live_seconds = live_seconds
    return train, test


def choose_access(folder: Path, manifest: Manifest, data: DataConfig, url: str) -> str:
    """Return indexed or stream; the log says why, where ``data.access`` leaves it open."""
    access, why = data.access, ""
    if access == "auto":
        missing = [s.name for s in manifest.shards if not index_path(folder / s.name).exists()]
        if url:
            access, why = "stream", "stream.options.url is given"
        elif missing and (folder / missing[0]).exists():
            access, why = "stream", f"'{missing[0]}' has no index"
        else:
            access, why = "indexed", "every shard has an index"
        log.info("[data] %s access to '%s': %s", access, folder, why)
    if access == "indexed" and url:
        raise ConfigError("stream.options.url needs data.access = 'stream'")
    if access == "stream" and data.verify:
        raise ConfigError("data.verify needs indexed access: checksums are in the index")
    return access
