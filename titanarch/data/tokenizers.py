"""Tokenizers of every format behind one interface."""

import hashlib
import importlib.resources
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import fsspec
import numpy as np
from pydantic import Field

from titanarch.config.errors import did_you_mean
from titanarch.config.registry import ComponentConfig, Registry
from titanarch.data.errors import data_error

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


def _file_bytes(path: str, builtin: str) -> bytes:
    """The tokenizer file at an fsspec URL, or the one that comes with the package."""
    if path == BUILTIN:
        return importlib.resources.files("titanarch.data").joinpath("corpus", "tokenizers", builtin).read_bytes()
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise data_error(f"cannot read the tokenizer: {error.strerror or error}", file=path, key="data.tokenizer.path") from error


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

        model = _file_bytes(config.path, "spm_unigram_8192.model")
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

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(token) for token in ids])

    def _byte_table(self) -> np.ndarray:
        model = self._model
        sizes = [
            0 if model.is_control(i) or model.is_unknown(i) else 1 if model.is_byte(i) else _piece_bytes(model.id_to_piece(i))
            for i in range(self.vocab_size)
        ]
        return np.array(sizes, dtype=np.int64)


def _piece_bytes(piece: str) -> int:
    return len(piece.replace(SPACE_MARK, " ").encode())


class HfTokenizerConfig(TokenizerConfig):
    """A tokenizer.json of the Hugging Face tokenizers library."""

    path: str = Field(BUILTIN, description="the .json file, an fsspec URL; 'builtin' is the 8,192-token byte-level BPE of the package")
    eos_token: str = Field("<|endoftext|>", description="the token that ends a document, as the file spells it")
    bos_token: str = Field("", description="the token that begins a text, as the file spells it; empty: there is none")


@TOKENIZERS.register("hf")
class HfTokenizer(Tokenizer):
    """A tokenizer.json. Its own truncation, padding and template of special tokens are switched off."""

    Config: ClassVar[type[ComponentConfig]] = HfTokenizerConfig

    def __init__(self, config: HfTokenizerConfig) -> None:
        super().__init__(config)
        import tokenizers  # only where it is used: a run on another format does without it

        content = _file_bytes(config.path, "hf_bytebpe_8192.json")
        try:
            self._model = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises the bare class
            raise data_error(f"is not a tokenizer.json: {error}", file=config.path, key="data.tokenizer.path") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # text that spells <|endoftext|> must not end a document
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = self._token(vocabulary, "eos_token", config.eos_token)
        self.bos_id = self._token(vocabulary, "bos_token", config.bos_token) if config.bos_token else None
        self.pad_id = None
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self._description = json.loads(content)
        self._vocabulary = vocabulary

    def _token(self, vocabulary: dict[str, int], name: str, token: str) -> int:
        if token not in vocabulary:
            added = [token.content for token in self._model.get_added_tokens_decoder().values()]
            raise data_error(f"the tokenizer has no token '{token}'{did_you_mean(token, added)}", key=f"data.tokenizer.{name}")
        return vocabulary[token]

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(token) for token in ids], skip_special_tokens=True)

    def _byte_table(self) -> np.ndarray:
        stages = json.dumps([self._description.get("decoder"), self._description.get("pre_tokenizer")])
        byte_level, spaced = '"ByteLevel"' in stages, '"Metaspace"' in stages or '"ByteFallback"' in stages
        if not byte_level and not spaced:
            raise data_error("bytes a token are known for byte-level and SentencePiece-like tokenizers only", key="data.tokenizer")
        table = np.zeros(self.vocab_size, dtype=np.int64)
        for token, number in self._vocabulary.items():
            # byte-level spells each byte as one character; byte fallback spells a byte as <0xAB>
            is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            table[number] = len(token) if byte_level else 1 if is_byte else _piece_bytes(token)
        for number, added in self._model.get_added_tokens_decoder().items():
            table[number] = 0 if added.special else len(added.content.encode())
        return table


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
