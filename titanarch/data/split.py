"""The documents of one split, numbered."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from titanarch.data.config import DataConfig
from titanarch.data.errors import DataError, data_error
from titanarch.data.sources import SOURCES, Document, MixtureConfig, Position, Source, Split, TextSource, TokensConfig, TokensSource
from titanarch.data.tokenizers import Tokenizer

Opened = TypeVar("Opened")


class Record(NamedTuple):
    """A document before it is parsed: its number in the split from 0, and where it begins."""

    number: int
    position: Position
    content: Any


class SplitSource:
    """The documents of one split of a text source, numbered from 0 in the source's order."""

    def __init__(self, config: DataConfig, split: Split) -> None:
        if split == "validation" and not has_validation(config):
            raise no_validation(config)
        source = open_source(config, split)
        assert isinstance(source, TextSource), "prepared tokens are opened, not read as text"
        self.source = source
        self.split = split
        self._fraction = 0.0 if split == "validation" and config.validation is not None else config.validation_fraction
        self._limit = config.limit_documents if split == "train" else 0
        streamed = config.mode == "streamed" and split == "train"
        self._skips_unreachable = not streamed  # ranks that read each for itself would not lose the same
        self._parsed: tuple[Position, Document | None] = (Position(), None)  # the last, so that it need not be parsed again
        self.passed_over = 0  # documents that were read by ``records`` and belong to another split

    def records(self, start: Record | None = None) -> Iterator[Record]:
        """The documents from ``start`` on (its content is not used), or all of them."""
        number, position = (start.number, start.position) if start else (0, Position())
        for place, content in self.source.records(position, unreachable=self._skips_unreachable):
            if self._limit and number >= self._limit:
                return
            if self._belongs(place, content):
                yield Record(number, place, content)
                number += 1
            elif self._parsed[1] is not None:
                self.passed_over += 1

    def _belongs(self, position: Position, content: Any) -> bool:
        """Malformed documents that are skipped have no number, so that all who read count alike."""
        if not (self.source.splits_itself or self._fraction or self.source.skips_errors):
            return True
        document = self.source.document(position, content, unreachable=self._skips_unreachable)
        self._parsed = (position, document)
        if document is None:
            return False
        if self.source.splits_itself:
            return document.split == self.split
        return self._fraction == 0 or held_out(document.id, self._fraction) == (self.split == "validation")

    def document(self, record: Record) -> Document:
        """The document of a record that ``records`` gave."""
        position, document = self._parsed
        return document if document is not None and position == record.position else self.source.parse(record.position, record.content)

    def text(self, record: Record) -> str:
        """That of ``document``."""
        position, document = self._parsed
        if document is not None and position == record.position:
            return document.text
        return self.source.text(record.position, record.content)

    def identity(self) -> list[Any]:
        """What changes whenever the documents of the split may have changed; JSON."""
        return [self.source.identity(), self.split, self._fraction, self._limit]

    def content_name(self, tokenizer: Tokenizer) -> str:
        """A hash of what the documents and their tokens are, wherever the files lie and whenever they were written."""
        content = [self.source.content(), self.split, self._fraction, self._limit, tokenizer.fingerprint, tokenizer.eos_id]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def empty(self) -> DataError:
        """What to raise when there turns out to be no document."""
        files = ", ".join(file.url for file in self.source.files[:3]) + (" ..." if len(self.source.files) > 3 else "")
        return data_error(f"the {self.split} split has no text in {files}", key="data.source")


def open_source(config: DataConfig, split: Split) -> Source:
    """The source that ``split`` is read from; an error names the section that configures it."""
    source_config = config.source_of(split)
    try:
        return SOURCES.of(source_config)(source_config, config.reading())
    except DataError as error:
        if source_config is config.source:
            raise
        problems = (replace(problem, key=problem.key.replace("data.source", "data.validation", 1)) for problem in error.problems)
        raise DataError(*problems) from error


def opened_mixture(config: DataConfig, opened: Callable[[DataConfig], Opened]) -> list[Opened]:
    """What ``opened`` makes of the section with each source of a mixture for its own; a DataError names the source by its place."""
    assert isinstance(config.source, MixtureConfig), "asked for a mixture alone"
    found = []
    for i, part in enumerate(config.source.sources):
        try:
            found.append(opened(config.model_copy(update={"source": part.source, "validation": None})))
        except DataError as error:
            place = f"data.source.sources[{i}].source"
            problems = (replace(problem, key=problem.key.replace("data.source", place, 1)) for problem in error.problems)
            raise DataError(*problems) from error
    return found


def held_out(document_id: str, fraction: float) -> bool:
    """Whether a document is validation: its hash, as a number in [0, 1), lies below ``fraction``."""
    return int.from_bytes(hashlib.sha256(document_id.encode(errors="backslashreplace")).digest()[:8], "big") < fraction * 2**64


def has_validation(config: DataConfig) -> bool:
    """Whether a validation split is configured."""
    if config.validation is not None or config.validation_fraction > 0:
        return True
    if isinstance(config.source, TokensConfig):
        prepared = TokensSource(config.source)
        folder = prepared.folder("validation")
        return folder is not None and folder != prepared.path
    return SOURCES.of(config.source).splits_itself


def no_validation(config: DataConfig) -> DataError:
    """What to raise when validation is wanted and there is none."""
    return data_error(
        f"the source '{config.source.kind}' holds nothing out: set data.validation_fraction, or a source of its own in [data.validation]",
        key="data.validation",
    )
