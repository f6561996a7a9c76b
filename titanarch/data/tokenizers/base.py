"""What a tokenizer is."""

import importlib.resources
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from titanarch.config.registry import ComponentConfig, Registry
from titanarch.data.errors import DataError, data_error
from titanarch.data.listing import filesystem, why_missing
from titanarch.data.retry import Reading

BUILTIN = "builtin"
SPACE_MARK = "\u2581"  # stands for a space in SentencePiece's pieces


class TokenizerConfig(ComponentConfig):
    """The table of a tokenizer."""


class Tokenizer(ABC):
    """Text to token ids and back.

    ``vocab_size``: ids are below it. ``bos_id``, ``eos_id``, ``pad_id``: None where the tokenizer has none.
    ``fingerprint``: sha256 of the tokenizer's file; data tokenized with another fingerprint are refused.
    """

    Config: ClassVar[type[ComponentConfig]]
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    fingerprint: str

    def __init__(self, config: ComponentConfig) -> None:
        self.config = config
        self._bytes_of_id: np.ndarray | None = None

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of ``text``, int32 [n]. Neither bos nor eos is added; text that spells one stays text."""

    def encode_document(self, text: str) -> np.ndarray:
        """The ids of ``text`` and, where there is one, the token that ends a document, int32 [n]."""
        ids = self.encode(text)
        return ids if self.eos_id is None else np.append(ids, np.int32(self.eos_id))

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ``ids``; control tokens give nothing."""

    @abstractmethod
    def _byte_table(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int64 [vocab_size]."""

    def token_bytes(self, ids: np.ndarray) -> np.ndarray:
        """UTF-8 bytes of text that each of ``ids`` stands for, int64 of the same shape; 0 for control tokens.

        Over a document they add up to its bytes, but for the space that SentencePiece puts before the first
        piece: it counts 1 there. The first token of a document is never a target, so it is in no measure.
        """
        if self._bytes_of_id is None:
            self._bytes_of_id = self._byte_table()
        return self._bytes_of_id[ids]

    def __reduce__(self) -> tuple[Any, ...]:
        return build_tokenizer, (self.config,)  # worker processes read the file themselves


TOKENIZERS: Registry[Tokenizer] = Registry("tokenizer")


def build_tokenizer(config: ComponentConfig) -> Tokenizer:
    """The tokenizer that ``config`` names. Raises DataError where its file is missing or damaged."""
    return TOKENIZERS.of(config)(config)


def file_bytes(path: str, builtin: str) -> bytes:
    """The tokenizer file at an fsspec URL, or the one that comes with the package."""
    if path == BUILTIN:
        return importlib.resources.files("titanarch.data").joinpath("corpus", "tokenizers", builtin).read_bytes()
    fs, place = filesystem(path, "data.tokenizer.path")
    try:
        return Reading().persist(lambda failures: bytes(fs.cat_file(place)), url=path, offset=0, closing=threading.Event())
    except DataError as error:
        cause = error.__cause__
        reason = why_missing(cause) if isinstance(cause, FileNotFoundError) else str(cause)
        raise data_error(f"cannot read the tokenizer: {reason}", file=path, key="data.tokenizer.path") from error


def piece_bytes(piece: str) -> int:
    """UTF-8 bytes that a piece of SentencePiece's spelling stands for."""
    return len(piece.replace(SPACE_MARK, " ").encode())
