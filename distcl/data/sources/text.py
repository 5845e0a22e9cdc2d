"""Text as a source of token ids: files, one domain each, or lines of JSON."""

from __future__ import annotations

import glob
import json
import logging
import sysconfig
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeInt

from distcl.config import StreamConfig
from distcl.config.paths import reachable
from distcl.data.sources.arrays import MAX_CLASSES, stratified
from distcl.data.sources.tokens import Tokenizer, Tokens, create_tokenizer
from distcl.errors import ConfigError, DataError
from distcl.registry import checked
from distcl.types import IGNORED, Batch, Ids, SourceInfo

log = logging.getLogger("distcl")

Document = tuple[str, bytes]
"""Where it comes from, and its text in UTF-8."""


class TokenSource:
    """Samples are stretches of one array of tokens; ids are rows.

    tokens: integers [M]; starts and lengths: int64 [N]. ``packed``: all are equally long, and x is
    int64 [B, T]. Otherwise x is a dict of ``input_ids`` and ``attention_mask``, int64 [B, T], with
    T the longest of the batch, padded on the right with ``end``. y is the label of each sample,
    int64 [B], if ``info`` has labels, else the tokens themselves, int64 [B, T], -100 where there is
    padding. Raises DataError if there is no sample.
    """

    def __init__(
        self, tokens: Tokens, starts: Ids, lengths: Ids, end: int, packed: bool, info: SourceInfo
    ) -> None:
        if not len(starts):
            raise DataError(f"{info.name}: there are no samples")
        self._tokens, self._starts, self._lengths = tokens, starts, lengths
        self._end, self._packed, self.info = end, packed, info

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, ids: Ids) -> Batch:
        """Read rows, see the class. Local. Raises DataError naming an id out of range."""
        ids = np.array(ids, dtype=np.int64)
        outside = (ids < 0) | (ids >= len(self))
        if outside.any():
            raise DataError(
                f"{self.info.name}: there is no sample {ids[outside][0]} (0…{len(self) - 1})"
            )
        lengths = self._lengths[ids]
        width = int(self._lengths[0] if self._packed else lengths.max(initial=0))
        places = np.arange(width)
        there = places < lengths[:, None]
        rows = np.where(there, self._starts[ids][:, None] + places, 0)
        tokens = np.where(there, self._tokens[rows], self._end).astype(np.int64)
        x = torch.from_numpy(tokens)
        labels = self.info.known_labels()
        if labels is not None:
            y = torch.from_numpy(labels[ids])
        else:
            y = torch.from_numpy(np.where(there, tokens, IGNORED))
        mask = torch.from_numpy(there.astype(np.int64))
        whole = x if self._packed else {"input_ids": x, "attention_mask": mask}
        return Batch(torch.from_numpy(ids), whole, y, len(ids))

    def part(self, rows: Ids) -> TokenSource:
        """Return a source of some of the samples, over the same tokens."""
        labels, groups = self.info.known_labels(), self.info.groups
        info = replace(
            self.info,
            labels=None if labels is None else labels[rows],
            groups=None if groups is None else groups[rows],
        )
        return TokenSource(
            self._tokens, self._starts[rows], self._lengths[rows], self._end, self._packed, info
        )

    def holdout(self, fraction: float) -> tuple[TokenSource, TokenSource]:
        """Split into (train, test), ``fraction`` of each domain and class in test.

        Raises DataError naming a domain that has none to spare.
        """
        info, labels = self.info, self.info.known_labels()
        groups = np.zeros(len(self), dtype=np.int64) if info.groups is None else info.groups
        strata = groups if labels is None else groups * (labels.max() + 1) + labels
        strata = np.unique(strata, return_inverse=True)[1]
        for k in np.setdiff1d(groups, groups[np.bincount(strata)[strata] > 1])[:1]:
            where = (
                f"domain '{info.group_names[k]}' of {info.name}" if info.group_names else info.name
            )
            has = "only one sample" if labels is None else "no two samples of one label"
            raise DataError(f"{where} has {has}, so none can be held out for testing")
        train, test = stratified(strata, fraction, info.name)
        return self.part(train), self.part(test)


@checked("stream")
def text(
    config: StreamConfig,
    length: int = 128,
    tokenizer: str = "bytes",
    end: str = "",
    domains: tuple[str, ...] = (),
    pack: bool = True,
    max_bytes: NonNegativeInt = 0,
) -> tuple[TokenSource, TokenSource]:
    """Return (train, test) of text files for language modelling; each domain is an experience.

    ``domains``: files, folders (all files below) or globs, relative to ``stream.path``, one domain
    each; without them, the folders in ``stream.path``, or its files, or the file itself. Texts that
    every Python has: ``python:topics`` (its documentation), ``python:library`` (its source code),
    ``python:names`` (the names of characters). ``max_bytes``: how much of a domain is read, whole
    characters; 0: all.

    ``tokenizer``: "bytes", or a ``tokenizer.json`` or its folder; ``end``: its token that ends a
    document. ``pack``: documents one after the other are cut into samples of ``length`` tokens, and
    what is left of a domain is dropped, with a word; otherwise each document is cut by itself, and
    its last sample is shorter. Of each domain ``stream.test_fraction`` of the samples is held out.

    Raises ConfigError if domains and experiences do not fit, DataError naming a file without text.
    """
    _check_length(length)
    found = _domains(config, list(domains))
    concepts = min(config.recurring or config.experiences, config.experiences)
    if len(found) != concepts:
        raise ConfigError(
            f"source 'text' has {len(found)} domains ({', '.join(found)}), but the stream has "
            f"{concepts} experiences (stream.experiences, stream.options.domains)"
        )
    known = create_tokenizer(tokenizer, end)
    parts: list[Tokens] = []
    starts: list[Ids] = []
    lengths: list[Ids] = []
    groups: list[Ids] = []
    at = 0
    for k, (name, documents) in enumerate(found.items()):
        within = _up_to(documents, max_bytes, name) if max_bytes else documents
        encoded = [_encoded(known, where, content) for where, content in within]
        sizes = [sum(map(len, encoded))] if pack else [len(document) for document in encoded]
        begin, size = _cut(np.array(sizes, dtype=np.int64), length, pack)
        if not len(begin):
            raise DataError(f"domain '{name}' has {sum(sizes)} tokens, too few for {length}")
        if left := sum(sizes) - int(size.sum()):
            log.info("[data] domain '%s': %d of %d tokens are left over", name, left, sum(sizes))
        parts += encoded
        starts.append(begin + at)
        lengths.append(size)
        groups.append(np.full(len(begin), k, dtype=np.int64))
        at += sum(sizes)
    info = SourceInfo(
        f"'{config.path}'" if config.path else "text",
        classes=known.size,
        groups=np.concatenate(groups),
        group_names=tuple(found),
        varies=not pack,
        tokens=known.size,
        longest=max(int(size.max()) for size in lengths),
    )
    tokens = np.concatenate(parts)
    pieces = np.concatenate(starts), np.concatenate(lengths)
    return TokenSource(tokens, *pieces, known.end, pack, info).holdout(config.test_fraction)


@checked("stream")
def jsonl(
    config: StreamConfig,
    text: str = "text",
    label: str = "",
    domain: str = "",
    length: int = 128,
    tokenizer: str = "bytes",
    end: str = "",
) -> tuple[TokenSource, TokenSource]:
    """Return (train, test) of ``stream.path``, a file of one JSON object a line, a sample each.

    ``text``, ``label``, ``domain``: names of fields. With ``label`` (integers, or strings, numbered
    by name) it is classification, else language modelling. ``domain``: its values, in the order of
    their first lines, are the experiences; "": every experience has all. A text is cut after
    ``length`` tokens. ``tokenizer`` and ``end``: as for source ``text``.

    Raises ConfigError if domains and experiences do not fit, DataError naming file and line.
    """
    _check_length(length)
    if not config.path:
        raise ConfigError("stream.source = 'jsonl' needs stream.path, a file")
    known, path = create_tokenizer(tokenizer, end), reachable(config.path)
    parts: list[Tokens] = []
    labels: list[Any] = []
    groups: list[Any] = []
    lines: list[int] = []
    cut = 0
    for number, line in enumerate(_bytes_of(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"'{path}', line {number}"
        try:
            fields = json.loads(line)
            content = fields[text]
            labels += [fields[label]] if label else []
            groups += [fields[domain]] if domain else []
            for value in (content, *labels[-1:], *groups[-1:]):
                str(value).encode()  # half a character, as JSON can write it, is none
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{where}: {type(error).__name__}: {error}") from None
        if not isinstance(content, str) or not content:
            raise DataError(f"{where}: '{text}' is no text")
        tokens = _encoded(known, where, content.encode())
        if not label and len(tokens) < 2:
            raise DataError(f"{where}: '{text}' has no token but its end: nothing can be foretold")
        cut += len(tokens) > length
        parts.append(tokens[:length])
        lines.append(number)
    if not parts:
        raise DataError(f"'{path}' has no samples")
    if cut:
        log.info(
            "[data] '%s': %d of %d texts are cut after %d tokens", path, cut, len(parts), length
        )
    sizes = np.array([len(part) for part in parts])
    info = SourceInfo(
        f"'{path}'",
        classes=known.size,
        varies=True,
        tokens=known.size,
        longest=int(sizes.max()),
    )
    if label:
        for number, value in zip(lines, labels, strict=True):
            if isinstance(value, int) and not 0 <= value < MAX_CLASSES:
                raise DataError(
                    f"'{path}', line {number}: label {value} is out of range (0…{MAX_CLASSES - 1})"
                )
        classes, numbers = _numbered(labels, f"'{path}', field '{label}'", ordered=True)
        info = replace(info, classes=0, labels=numbers, class_names=classes)
    if domain:
        names, numbers = _numbered(groups, f"'{path}', field '{domain}'", ordered=False)
        concepts = min(config.recurring or config.experiences, config.experiences)
        if len(names) != concepts:
            raise ConfigError(
                f"'{path}' has {len(names)} values of '{domain}' ({', '.join(names[:8])}), but the "
                f"stream has {concepts} experiences (stream.experiences)"
            )
        info = replace(info, groups=numbers, group_names=names)
    starts = sizes.cumsum() - sizes
    source = TokenSource(np.concatenate(parts), starts, sizes, known.end, False, info)
    return source.holdout(config.test_fraction)


def _check_length(length: int) -> None:
    if length < 2:
        raise ConfigError(f"stream.options.length = {length}: a sample needs two tokens or more")


def _encoded(tokenizer: Tokenizer, where: str, content: bytes) -> Tokens:
    """Return the tokens of a document and its end, in the least unsigned type that holds all."""
    try:
        found = tokenizer.encode(content)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is no UTF-8 text: {error}") from None
    kind = np.min_scalar_type(tokenizer.size)
    return np.append(found.astype(kind), np.array([tokenizer.end], dtype=kind))


def _cut(sizes: Ids, length: int, pack: bool) -> tuple[Ids, Ids]:
    """Return starts and lengths of the samples of stretches of ``sizes`` tokens.

    Without ``pack`` a stretch may end in a shorter sample, of two tokens or more.
    """
    begin, counts = sizes.cumsum() - sizes, sizes // length if pack else -(-sizes // length)
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    lengths = np.minimum(np.repeat(sizes, counts) - within * length, length)
    starts = np.repeat(begin, counts) + within * length
    return starts[lengths > 1], lengths[lengths > 1]


def _up_to(documents: Iterator[Document], most: int, name: str) -> Iterator[Document]:
    """Yield documents of ``most`` bytes together: the last is cut, between characters."""
    left = most
    for where, content in documents:
        if len(content) > left:
            log.info("[data] domain '%s' is cut after %d bytes (max_bytes)", name, most)
            end = left
            while end > max(0, left - 3) and content[end] & 0xC0 == 0x80:
                end -= 1
            if end:
                yield where, content[:end]
            return
        yield where, content
        left -= len(content)


def _domains(config: StreamConfig, wanted: list[str]) -> dict[str, Iterator[Document]]:
    """Return the documents of each domain by its name."""
    base = reachable(config.path or ".")
    if wanted:
        return {
            name: _BUILT_IN[name]() if name in _BUILT_IN else _files(_matching(base, name))
            for name in wanted
        }
    if not config.path:
        raise ConfigError("source 'text' needs stream.path or stream.options.domains")
    if not base.exists():
        raise DataError(f"stream.path: there is no '{base}'")
    if base.is_file():
        return {base.name: _files([base])}
    within = sorted(path for path in base.iterdir() if not path.name.startswith("."))
    found = [path for path in within if path.is_dir()] or within
    if not found:
        raise DataError(f"'{base}' holds no files")
    return {path.name: _files(_below(path)) for path in found}


def _matching(base: Path, pattern: str) -> list[Path]:
    path = base / reachable(pattern)
    every = map(Path, glob.glob(str(reachable(pattern)), root_dir=base, recursive=True))
    found = (
        _below(path)
        if path.exists()
        else sorted(p for p in map(base.joinpath, every) if p.is_file())
    )
    if not found:
        raise DataError(f"stream.options.domains: '{pattern}' matches no file in '{base}'")
    return found


def _below(path: Path) -> list[Path]:
    """Return a file, or all files below a folder, by name; those that begin with a dot are not."""
    if path.is_file():
        return [path]
    every = sorted(p for p in path.rglob("*") if p.is_file())
    return [p for p in every if not any(part.startswith(".") for part in p.relative_to(path).parts)]


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from None


def _files(paths: list[Path]) -> Iterator[Document]:
    for path in paths:
        content = _bytes_of(path)
        if b"\0" in content[:4096]:
            raise DataError(f"'{path}' is no text: it has bytes of value 0")
        yield f"'{path}'", content


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, content in sorted(topics.items()):
        yield f"topic '{name}'", content.encode()


def _library() -> Iterator[Document]:
    folder = Path(sysconfig.get_path("stdlib"))
    return _files(sorted(folder.glob("*.py")))


def _names() -> Iterator[Document]:
    """The names of characters, 256 characters a document."""
    for start in range(0, 0x1_0000, 256):
        lines = (f"{chr(c)} {unicodedata.name(chr(c), '')}" for c in range(start, start + 256))
        named = "\n".join(line for line in lines if len(line) > 2)
        if named:
            yield f"characters from {start}", named.encode(errors="replace")


_BUILT_IN = {"python:topics": _topics, "python:library": _library, "python:names": _names}


def _numbered(values: list[Any], what: str, ordered: bool) -> tuple[tuple[str, ...], Ids]:
    """Return the names of the different values, and the number [N] of each."""
    kinds = {type(value) for value in values}
    if kinds == {int} and ordered:
        return (), np.array(values, dtype=np.int64)
    if kinds - {str, int} or len(kinds) > 1:
        raise DataError(f"{what}: values are {', '.join(sorted(k.__name__ for k in kinds))}")
    names = sorted(set(values)) if ordered else list(dict.fromkeys(values))
    numbers = {name: k for k, name in enumerate(names)}
    return tuple(map(str, names)), np.array([numbers[value] for value in values], dtype=np.int64)
