"""The corpus that comes with the package: 240 public-domain documents, 16 MB of English."""

import importlib.resources
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from titanarch.config.registry import ComponentConfig
from titanarch.data.checksums import sha256_of
from titanarch.data.listing import find_files
from titanarch.data.retry import Reading
from titanarch.data.sources.base import SOURCES, Document, Position, SourceConfig
from titanarch.data.sources.jsonl import JsonLines


class CorpusConfig(SourceConfig):
    """The corpus that comes with the package; split by document into train and validation."""


@SOURCES.register("corpus")
class CorpusSource(JsonLines):
    """The built-in corpus; each line says its split."""

    Config: ClassVar[type[ComponentConfig]] = CorpusConfig
    splits_itself = True
    text_key = "text"
    id_key = "id"

    def __init__(self, config: CorpusConfig, reading: Reading = Reading()) -> None:  # noqa: B008 (immutable)
        super().__init__(config, find_files([str(corpus_path())]), reading)

    def parse(self, position: Position, record: bytes) -> Document:
        item = self.parse_object(position, record)
        return Document(item["id"], item["text"], item["split"])

    def identity(self) -> list[Any]:
        return ["corpus", _checksum()]  # the content, so that a reinstalled package finds its cache


def corpus_path() -> Path:
    """The corpus among the package's files."""
    return Path(str(importlib.resources.files("titanarch.data").joinpath("corpus", "corpus.jsonl.gz")))


@cache
def _checksum() -> str:
    return sha256_of(corpus_path())
