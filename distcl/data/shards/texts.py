"""Texts in shards: samples of token ids, as the sources of texts make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distcl.data.shards.decode import decode, npy_bytes
from distcl.data.shards.manifest import MANIFEST, Texts
from distcl.data.sources.arrays import MAX_CLASSES
from distcl.data.sources.tokens import TokenSource, side_by_side
from distcl.data.transforms import Sample
from distcl.errors import DataError
from distcl.types import Ids, PyTree, SourceInfo

_IDS = "input_ids.npy"


def texts_of(*sources: TokenSource) -> Texts:
    """Return what the manifest says of these splits. Raises DataError on too many labels."""
    info, labels = sources[0].info, [source.info.known_labels() for source in sources]
    classes = max((int(found.max()) + 1 for found in labels if found is not None), default=0)
    texts = Texts(
        tokens=info.tokens,
        tokenizer=info.tokenizer,
        end=sources[0].end,
        longest=info.longest,
        packed=sources[0].packed,
        classes=max(classes, len(info.class_names)),
        domains=list(info.group_names),
    )
    if len(texts.domains) * texts.classes > MAX_CLASSES:
        raise DataError(f"{info.name}: labels and domains have more than {MAX_CLASSES} pairs")
    return texts


def joined_texts(folder: Path, old: Texts | None, new: Texts | None) -> Texts | None:
    """Return what shards are that get more samples. Raises DataError naming what differs."""
    if old is None and new is None:
        return None
    if old is None or new is None:
        raise DataError(f"only one of '{folder}' and what is to be added has texts (token ids)")
    longest = max(old.longest, new.longest)
    wanted = old if old.packed else replace(old, longest=longest)
    found = asdict(new if new.packed else replace(new, longest=longest))
    for name, value in asdict(wanted).items():
        if value != found[name]:
            raise DataError(
                f"'{folder}' has texts with {name} = {value!r} ({MANIFEST}), but what is to be "
                f"added has {found[name]!r}"
            )
    return wanted


def token_members(source: Any, row: int, texts: Texts) -> dict[str, bytes]:
    """Return a sample of a TokenSource as members: token ids, of the least type, and numbers."""
    info, tokens = source.info, source.stored(row)
    members = {_IDS: npy_bytes(tokens.astype(np.min_scalar_type(max(texts.tokens - 1, 0))))}
    if texts.domains or not texts.classes:
        members["domain"] = b"%d" % (info.groups[row] if texts.domains else 0)
    labels = info.known_labels()
    return members if labels is None else members | {"cls": b"%d" % labels[row]}


def decode_tokens(members: Mapping[str, bytes], value: int, texts: Texts) -> Sample:
    """Return the tokens of a sample, and its label; ``value``: what the index has of it.

    Raises DataError if they are not what ``texts`` says.
    """
    if _IDS not in members:
        others = ", ".join(f"'{ext}'" for ext in members)
        raise DataError(f"there is no member '{_IDS}' beside {others}, but {MANIFEST} has texts")
    tokens = decode(_IDS, members[_IDS])
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"member '{_IDS}' holds {tokens.dtype} of shape {tokens.shape}, no list of token ids"
        )
    least = 1 if texts.classes else 2
    if texts.packed:
        least = texts.longest
    if not least <= len(tokens) <= texts.longest:
        raise DataError(f"it has {len(tokens)} tokens; {least} to {texts.longest} are needed")
    if (most := int(tokens.max())) >= texts.tokens or tokens.min() < 0:
        wrong = most if most >= texts.tokens else int(tokens.min())
        raise DataError(f"token id {wrong} is not in 0…{texts.tokens - 1}, as {MANIFEST} says")
    return {_IDS: tokens, "cls": value % max(texts.classes, 1)}


def info_of_texts(info: SourceInfo, texts: Texts) -> SourceInfo:
    """Return what shards of texts say of themselves; ``info``: what they would as others."""
    found = replace(
        info,
        tokens=texts.tokens,
        tokenizer=texts.tokenizer,
        longest=texts.longest,
        varies=not texts.packed,
        transformed=False,
    )
    if not texts.classes:
        return replace(found, labels=None, classes=texts.tokens)

    def labels() -> Ids | None:
        column = info.known_labels()
        return None if column is None else column % texts.classes

    return replace(found, labels=labels, classes=texts.classes)


class TokenStack:
    """Makes batches of decoded samples, as :class:`data.sources.tokens.TokenSource` has them."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def __call__(self, samples: Sequence[Sample], ids: Ids) -> tuple[PyTree, torch.Tensor]:
        """Return (x, y) of samples [B], of which there may be none."""
        texts = self._texts
        parts = [sample[_IDS] for sample in samples]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        width = texts.longest if texts.packed else 0
        x, y = side_by_side(tokens, lengths.cumsum() - lengths, lengths, width, texts.end)
        if texts.classes:
            y = torch.tensor([sample["cls"] for sample in samples], dtype=torch.int64)
        return x, y
