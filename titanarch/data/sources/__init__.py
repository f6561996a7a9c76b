"""The kinds of source; importing this package registers them."""

from titanarch.data.sources.base import SOURCES, Document, FilesConfig, Position, Source, SourceConfig, Split, TextSource
from titanarch.data.sources.corpus import CorpusConfig, CorpusSource
from titanarch.data.sources.huggingface import HuggingFaceConfig, HuggingFaceSource
from titanarch.data.sources.jsonl import JsonlConfig, JsonlSource
from titanarch.data.sources.mixture import MixedSourceConfig, MixtureConfig, MixtureSource
from titanarch.data.sources.parquet import ParquetConfig, ParquetSource
from titanarch.data.sources.tar import TarConfig, TarSource
from titanarch.data.sources.text import PlainTextSource, TextConfig
from titanarch.data.sources.tokens import TokensConfig, TokensSource

__all__ = [
    "SOURCES",
    "CorpusConfig",
    "CorpusSource",
    "Document",
    "FilesConfig",
    "HuggingFaceConfig",
    "HuggingFaceSource",
    "JsonlConfig",
    "JsonlSource",
    "MixedSourceConfig",
    "MixtureConfig",
    "MixtureSource",
    "ParquetConfig",
    "ParquetSource",
    "PlainTextSource",
    "Position",
    "Source",
    "SourceConfig",
    "Split",
    "TarConfig",
    "TarSource",
    "TextConfig",
    "TextSource",
    "TokensConfig",
    "TokensSource",
]
