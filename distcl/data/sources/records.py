"""Texts in records, a sample each: lines of JSON, or rows of a Hugging Face dataset."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from distcl.config import DataConfig, StreamConfig
from distcl.config.paths import reachable
from distcl.data.sources.arrays import MAX_CLASSES
from distcl.data.sources.grouping import group_values, has_value
from distcl.data.sources.huggingface import load_splits
from distcl.data.sources.text import bytes_of, stamps_of
from distcl.data.sources.token_cache import cached
from distcl.data.sources.tokens import (
    Tokenizer,
    Tokens,
    TokenSource,
    check_length,
    create_tokenizer,
    encoded,
)
from distcl.errors import ConfigError, DataError
from distcl.registry import checked, nearest
from distcl.types import Ids, SourceInfo

log = logging.getLogger("distcl")

Record = tuple[str, Mapping[str, Any]]
"""Where it comes from, and its fields."""


@checked("stream")
def jsonl(
    config: StreamConfig,
    data: DataConfig | None = None,
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
    check_length(length)
    if not config.path:
        raise ConfigError("stream.source = 'jsonl' needs stream.path, a file")
    known = create_tokenizer(tokenizer, end)
    file, domain = reachable(config.path), _domain(config, domain)
    texts = _Texts(f"'{file}'", text, label, domain, length, known)
    found = texts.source(config, data, lambda: _lines(file), lambda: stamps_of([file]))
    return found.holdout(config.test_fraction)


@checked("stream")
def hf_text(
    config: StreamConfig,
    data: DataConfig | None = None,
    text: str = "text",
    tokens: str = "",
    label: str = "",
    domain: str = "",
    length: int = 128,
    tokenizer: str = "bytes",
    end: str = "",
    train: str = "train",
    test: str = "test",
    name: str | None = None,
    revision: str | None = None,
) -> tuple[TokenSource, TokenSource]:
    """Return (train, test) of the texts of a Hugging Face dataset, a sample a row.

    ``stream.path``, ``train``, ``test``, ``name``, ``revision``: as for source ``hf``. ``text``: a
    column of texts, turned into token ids as by source ``jsonl``; or ``tokens``: one of lists of
    token ids (``input_ids``), which are taken as they are. The others: as for ``jsonl``.

    Raises ConfigError if the extra is not installed, or a split or column is not there; DataError
    naming split and row.
    """
    check_length(length)
    if tokens and (tokenizer != "bytes" or end):
        raise ConfigError(
            f"stream.options.tokens = '{tokens}' are token ids; they need no tokenizer"
        )
    domain = _domain(config, domain)
    splits = load_splits(config, train, test, name, revision)
    known: Tokenizer | None = None if tokens else create_tokenizer(tokenizer, end)
    texts = _Texts(f"'{config.path}'", tokens or text, label, domain, length, known)
    wanted = {"tokens" if tokens else "text": texts.text, "label": label, "domain": domain}
    for split, rows in splits.items():
        for option, column in wanted.items():
            if column and column not in rows.column_names:
                raise ConfigError(
                    f"'{config.path}', {split} has no column '{column}'"
                    f"{nearest(column, rows.column_names)}; it has {', '.join(rows.column_names)} "
                    f"(stream.options.{option})"
                )
    columns = list(dict.fromkeys(column for column in wanted.values() if column))

    def records() -> Iterator[Record]:
        for split, rows in splits.items():
            yield from _rows(
                rows.select_columns(columns).with_format(None), f"'{config.path}', {split}"
            )

    def stamps() -> Any:
        return [(split, len(rows), rows._fingerprint) for split, rows in splits.items()]

    first, *others = splits.values()
    names = tuple(getattr(first.features.get(label), "names", None) or ())
    source = texts.source(config, data, records, stamps, names)
    if not others:
        return source.holdout(config.test_fraction)
    rows = np.arange(len(source))
    return source.part(rows[: len(first)]), source.part(rows[len(first) :])


def _domain(config: StreamConfig, domain: str) -> str:
    """Return the option ``domain``, or else the field of ``stream.experiences = "key:FIELD"``."""
    key = config.grouping[2] if config.grouping[0] == "key" else ""
    if domain and key not in ("", domain):
        raise ConfigError(
            f"stream.experiences = '{config.experiences}' and stream.options.domain = '{domain}' "
            "both say what makes an experience; leave one out"
        )
    return domain or key


def _lines(file: Path) -> Iterator[Record]:
    for number, line in enumerate(bytes_of(file).splitlines(), 1):
        if not line.strip():
            continue
        where = f"'{file}', line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: {type(error).__name__}: {error}") from None
        if not isinstance(fields, dict):
            raise DataError(f"{where} is no JSON object")
        yield where, fields


def _rows(split: Any, what: str) -> Iterator[Record]:
    for number, fields in enumerate(split):
        yield f"{what}, row {number}", fields


@dataclass
class _Texts:
    """Collects records as tokens, labels and domains; ``name``: of what they are in.

    ``text``, ``label``, ``domain``: names of fields. ``known``: the tokenizer, None for token ids.
    """

    name: str
    text: str
    label: str
    domain: str
    length: int
    known: Tokenizer | None
    parts: list[Tokens] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)
    cut: int = 0

    def _take(self, records: Iterator[Record]) -> None:
        """Take in records. Raises DataError saying where one is that cannot be a sample."""
        for where, fields in records:
            tokens = self._tokens(where, self._field(where, fields, self.text))
            if not self.label and len(tokens) < 2:
                raise DataError(
                    f"{where}: '{self.text}' has no token but its end: nothing can be foretold"
                )
            if self.label:
                value = self._field(where, fields, self.label)
                if not isinstance(value, int | str) or isinstance(value, bool):
                    raise DataError(
                        f"{where}: '{self.label}' is {value!r}; labels are integers or texts"
                    )
                if isinstance(value, int) and not 0 <= value < MAX_CLASSES:
                    raise DataError(f"{where}: label {value} is out of range (0…{MAX_CLASSES - 1})")
                self.labels.append(value)
            if self.domain:
                value = self._field(where, fields, self.domain)
                if not has_value(value):
                    raise DataError(f"{where}: '{self.domain}' is {value!r}, no domain")
                self.groups.append(value)
            self.cut += len(tokens) > self.length
            self.parts.append(tokens[: self.length])

    def _field(self, where: str, fields: Mapping[str, Any], name: str) -> Any:
        if name not in fields:
            raise DataError(f"{where}: there is no '{name}'{nearest(name, fields)}")
        value = fields[name]
        try:
            str(value).encode()  # half a character, as JSON can write it, is none
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: UnicodeEncodeError: {error}") from None
        return value

    def _tokens(self, where: str, content: Any) -> Tokens:
        if self.known is not None:
            if not isinstance(content, str) or not content:
                raise DataError(f"{where}: '{self.text}' is no text")
            return encoded(self.known, where, content.encode())
        try:
            found = np.asarray(content)
        except ValueError:  # lists of unequal lengths within
            found = np.empty(0)
        if found.ndim != 1 or found.dtype.kind not in "iu" or not found.size or found.min() < 0:
            raise DataError(f"{where}: '{self.text}' is no list of token ids, 0 or more")
        if found.max() >= MAX_CLASSES:
            raise DataError(f"{where}: token id {found.max()} is not below {MAX_CLASSES}")
        return found.astype(np.int32)

    def source(
        self,
        config: StreamConfig,
        data: DataConfig | None,
        records: Callable[[], Iterator[Record]],
        stamps: Callable[[], Any],
        class_names: tuple[str, ...] = (),
    ) -> TokenSource:
        """Return all records as one source, or what is kept of them: ``stamps`` tell them apart.

        Raises ConfigError if domains do not fit, DataError naming a record that is no sample.
        """
        grouped = str(config.experiences) if config.grouping[0] == "key" else ""
        what = {
            "grouped": grouped,
            "source": [config.source, self.name, stamps() if data and data.cache else None],
            "fields": [self.text, self.label, self.domain],
            "length": self.length,
            "tokenizer": self.known and [self.known.name, self.known.end],
        }

        def make() -> TokenSource:
            self._take(records())
            return self._made(class_names, grouped)

        made = cached(data, what, make)
        names = made.info.group_names
        concepts = config.concepts
        if self.domain and concepts and len(names) != concepts:
            raise ConfigError(
                f"{self.name} has {len(names)} values of '{self.domain}' "
                f"({', '.join(names[:8])}), but the stream has {concepts} experiences "
                "(stream.experiences)"
            )
        return made

    def _made(self, class_names: tuple[str, ...], grouped: str) -> TokenSource:
        if not self.parts:
            raise DataError(f"{self.name} has no samples")
        if self.cut:
            number = len(self.parts)
            log.info(
                "[data] %s: %d of %d texts are cut after %d tokens",
                self.name,
                self.cut,
                number,
                self.length,
            )
        sizes = np.array([len(part) for part in self.parts])
        tokens = np.concatenate(self.parts)
        size = int(tokens.max()) + 1 if self.known is None else self.known.size
        info = SourceInfo(
            self.name,
            classes=size,
            varies=True,
            tokens=size,
            tokenizer="" if self.known is None else self.known.name,
            longest=int(sizes.max()),
        )
        if self.label:
            names, numbers = _numbered(self.labels, f"{self.name}, field '{self.label}'", True)
            info = replace(info, classes=0, labels=numbers, class_names=names or class_names)
        if self.domain:
            if grouped:
                (numbers,), names = group_values([self.groups], [self.name])
            else:
                what = f"{self.name}, field '{self.domain}'"
                names, numbers = _numbered(self.groups, what, False)
            info = replace(info, groups=numbers, group_names=names, grouped=grouped)
        end = 0 if self.known is None else self.known.end
        return TokenSource(tokens, sizes.cumsum() - sizes, sizes, end, False, info)


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
