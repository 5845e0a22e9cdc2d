"""Texts as token ids: what makes them, bytes or a tokenizer's file, and the source of samples."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from distcl.config.paths import reachable
from distcl.data.sources.arrays import stratified
from distcl.errors import ConfigError, DataError
from distcl.types import IGNORED, Batch, Ids, PyTree, SourceInfo

Tokens = npt.NDArray[np.integer[Any]]


class Tokenizer(Protocol):
    """Turns a document into token ids; ``end`` stands after every document."""

    name: str
    """What tells it apart from others."""
    size: int
    """Ids are below this."""
    end: int

    def encode(self, text: bytes) -> Tokens:
        """Return the ids [T] of a text in UTF-8. Raises UnicodeDecodeError if it is none."""
        ...


class Bytes:
    """The bytes of a text are its tokens, 0 to 255; 256 ends a document."""

    name, size, end = "bytes", 257, 256

    def encode(self, text: bytes) -> Tokens:
        """Return the ids, uint8 [T]."""
        return np.frombuffer(text, dtype=np.uint8)


class TokenizerFile:
    """A tokenizer of the package ``tokenizers``: its JSON file, or a folder that holds one.

    ``end``: the token that ends a document; "": the first of ``USUAL`` that there is. Raises
    ConfigError naming the file that is none, or has no such token.
    """

    USUAL = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")

    def __init__(self, path: Path, end: str = "") -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(
                f"stream.options.tokenizer: there is no file '{file}'; it is 'bytes', or a "
                "tokenizer.json or its folder"
            )
        try:
            from tokenizers import Tokenizer as Found
        except ImportError as error:
            raise ConfigError(
                "a file as stream.options.tokenizer needs the package 'tokenizers'; type: "
                f"pip install 'distcl[transformers]' ({error})"
            ) from error
        try:
            self._found = Found.from_file(str(file))
        except Exception as error:  # the package raises nothing narrower
            raise ConfigError(f"'{file}' is no file of the package tokenizers: {error}") from None
        self.name = f"a file of SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}…"
        vocabulary = self._found.get_vocab(with_added_tokens=True)
        self.size = 1 + max(vocabulary.values(), default=0)  # ids may have gaps
        names = (end,) if end else self.USUAL
        ids = [i for i in map(self._found.token_to_id, names) if i is not None]
        if not ids:
            raise ConfigError(
                f"'{file}' has no token {' or '.join(map(repr, names))} that could end a document; "
                "name one (stream.options.end)"
            )
        self.end = int(ids[0])

    def encode(self, text: bytes) -> Tokens:
        """Return the ids, int32 [T], without special tokens."""
        found = self._found.encode(text.decode(), add_special_tokens=False)
        return np.array(found.ids, dtype=np.int32)


def create_tokenizer(name: str, end: str) -> Tokenizer:
    """Return ``stream.options.tokenizer``: "bytes", or one from a file. Raises ConfigError."""
    if name == "bytes":
        if end:
            raise ConfigError("stream.options.end is for a tokenizer from a file, not for 'bytes'")
        return Bytes()
    return TokenizerFile(reachable(name), end)


def check_length(length: int) -> None:
    """Raise ConfigError for a length of samples from which nothing can be foretold."""
    if length < 2:
        raise ConfigError(f"stream.options.length = {length}: a sample needs two tokens or more")


def encoded(tokenizer: Tokenizer, where: str, content: bytes) -> Tokens:
    """Return the tokens of a document and its end, in the least unsigned type that holds all."""
    try:
        found = tokenizer.encode(content)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is no UTF-8 text: {error}") from None
    kind = np.min_scalar_type(tokenizer.size)
    return np.append(found.astype(kind), np.array([tokenizer.end], dtype=kind))


def side_by_side(
    tokens: Tokens, starts: Ids, lengths: Ids, width: int, end: int
) -> tuple[PyTree, torch.Tensor]:
    """Return (x, y) of stretches [B] of ``tokens``, see :class:`TokenSource`.

    ``width``: the length of each; 0: they may be unequal.
    """
    places = np.arange(width or lengths.max(initial=0))
    there = places < lengths[:, None]
    rows = np.where(there, starts[:, None] + places, 0)
    found = np.where(there, tokens[rows], end).astype(np.int64)
    x, y = torch.from_numpy(found), torch.from_numpy(np.where(there, found, IGNORED))
    mask = torch.from_numpy(there.astype(np.int64))
    return (x if width else {"input_ids": x, "attention_mask": mask}), y


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
        self.end, self.packed, self.info = end, packed, info

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
        width = int(self._lengths[0]) if self.packed else 0
        x, y = side_by_side(self._tokens, self._starts[ids], self._lengths[ids], width, self.end)
        labels = self.info.known_labels()
        if labels is not None:
            y = torch.from_numpy(labels[ids])
        return Batch(torch.from_numpy(ids), x, y, len(ids))

    @property
    def arrays(self) -> tuple[Tokens, Ids, Ids]:
        """All tokens [M], and where samples begin and how long they are, int64 [N]."""
        return self._tokens, self._starts, self._lengths

    def stored(self, row: int) -> Tokens:
        """Return the tokens [T] of a sample, of the type they are stored in. Local."""
        return self._tokens[self._starts[row] :][: self._lengths[row]]

    def part(self, rows: Ids) -> TokenSource:
        """Return a source of some of the samples, over the same tokens."""
        labels, groups = self.info.known_labels(), self.info.groups
        info = replace(
            self.info,
            labels=None if labels is None else labels[rows],
            groups=None if groups is None else groups[rows],
        )
        return TokenSource(
            self._tokens, self._starts[rows], self._lengths[rows], self.end, self.packed, info
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
