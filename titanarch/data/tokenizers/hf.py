"""The tokenizer.json of the Hugging Face tokenizers library."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from titanarch.config.errors import did_you_mean
from titanarch.config.registry import ComponentConfig
from titanarch.data.errors import data_error
from titanarch.data.tokenizers.base import BUILTIN, TOKENIZERS, Tokenizer, TokenizerConfig, file_bytes, piece_bytes


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

        # A text at a time leaves its threads nothing to do, and after a fork they would be warned of
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        content = file_bytes(config.path, "hf_bytebpe_8192.json")
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
        (encoding,) = self._model.encode_batch_fast([text], add_special_tokens=False)  # without offsets, which take a quarter of the time
        return np.array(encoding.ids, dtype=np.int32)

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
            table[number] = len(token) if byte_level else 1 if is_byte else piece_bytes(token)
        for number, added in self._model.get_added_tokens_decoder().items():
            table[number] = 0 if added.special else len(added.content.encode())
        return table
