"""SentencePiece models."""

import hashlib
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from titanarch.config.registry import ComponentConfig
from titanarch.data.errors import data_error
from titanarch.data.tokenizers.base import BUILTIN, TOKENIZERS, Tokenizer, TokenizerConfig, file_bytes, piece_bytes


class SentencePieceConfig(TokenizerConfig):
    """A SentencePiece model."""

    path: str = Field(BUILTIN, description="the .model file, an fsspec URL; 'builtin' is the 8,192-piece model of the package")


@TOKENIZERS.register("sentencepiece")
class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. The character U+2581 is SentencePiece's own mark and comes back as a space."""

    Config: ClassVar[type[ComponentConfig]] = SentencePieceConfig

    def __init__(self, config: SentencePieceConfig) -> None:
        super().__init__(config)
        import sentencepiece  # only where it is used: a run on another format does without it

        model = file_bytes(config.path, "spm_unigram_8192.model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise data_error("is not a SentencePiece model, or is truncated", file=config.path, key="data.tokenizer.path") from error
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id, self.pad_id = (
            None if token == -1 else token for token in (self._model.bos_id(), self._model.eos_id(), self._model.pad_id())
        )
        self.fingerprint = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return self._model.encode_as_numpy(text)

    def encode_document(self, text: str) -> np.ndarray:
        return self._model.encode_as_numpy(text, add_eos=self.eos_id is not None)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(token) for token in ids])

    def _byte_table(self) -> np.ndarray:
        model = self._model
        sizes = [
            0 if model.is_control(i) or model.is_unknown(i) else 1 if model.is_byte(i) else piece_bytes(model.id_to_piece(i))
            for i in range(self.vocab_size)
        ]
        return np.array(sizes, dtype=np.int64)
