"""Bytes as tokens."""

import hashlib
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from titanarch.config.registry import ComponentConfig
from titanarch.data.tokenizers.base import TOKENIZERS, Tokenizer, TokenizerConfig


class BytesConfig(TokenizerConfig):
    """UTF-8 bytes."""


@TOKENIZERS.register("bytes")
class BytesTokenizer(Tokenizer):
    """A token a byte, and token 256 to end a document."""

    Config: ClassVar[type[ComponentConfig]] = BytesConfig
    vocab_size = 257
    bos_id = None
    eos_id = 256
    pad_id = None
    fingerprint = hashlib.sha256(b"titanarch bytes 1").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        values = np.asarray(ids, dtype=np.int64)
        return values[values < 256].astype(np.uint8).tobytes().decode(errors="replace")

    def _byte_table(self) -> np.ndarray:
        return np.array([1] * 256 + [0], dtype=np.int64)
