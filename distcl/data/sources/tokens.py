"""What turns a text into token ids: its bytes, or a tokenizer from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from distcl.config.paths import reachable
from distcl.errors import ConfigError

Tokens = npt.NDArray[np.integer[Any]]


class Tokenizer(Protocol):
    """Turns a document into token ids; ``end`` stands after every document."""

    size: int
    """Ids are below this."""
    end: int

    def encode(self, text: bytes) -> Tokens:
        """Return the ids [T] of a text in UTF-8. Raises UnicodeDecodeError if it is none."""
        ...


class Bytes:
    """The bytes of a text are its tokens, 0 to 255; 256 ends a document."""

    size, end = 257, 256

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
