"""Tokenizers of every format behind one interface; importing this package registers them."""

from titanarch.data.tokenizers.base import TOKENIZERS, Tokenizer, TokenizerConfig, build_tokenizer
from titanarch.data.tokenizers.bytes import BytesConfig, BytesTokenizer
from titanarch.data.tokenizers.hf import HfTokenizer, HfTokenizerConfig
from titanarch.data.tokenizers.sentencepiece import SentencePieceConfig, SentencePieceTokenizer
from titanarch.data.tokenizers.tiktoken import TiktokenConfig, TiktokenTokenizer

__all__ = [
    "TOKENIZERS",
    "BytesConfig",
    "BytesTokenizer",
    "HfTokenizer",
    "HfTokenizerConfig",
    "SentencePieceConfig",
    "SentencePieceTokenizer",
    "TiktokenConfig",
    "TiktokenTokenizer",
    "Tokenizer",
    "TokenizerConfig",
    "build_tokenizer",
]
