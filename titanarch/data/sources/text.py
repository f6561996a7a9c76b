"""Documents as plain text files."""

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from titanarch.config.registry import ComponentConfig
from titanarch.config.section import ListOf
from titanarch.data.errors import data_error
from titanarch.data.files import BUFFER_BYTES, ByteStream
from titanarch.data.listing import find_files
from titanarch.data.retry import Reading
from titanarch.data.sources.base import SOURCES, Document, FilesConfig, Position, TextSource


class TextConfig(FilesConfig):
    """Plain text files."""

    paths: ListOf[str] = Field(description="text files, plain, .gz or .zst: fsspec URLs or globs", min_length=1)
    separator: str = Field("", description="text that parts the documents of a file; empty: one document a file")


@SOURCES.register("text")
class PlainTextSource(TextSource):
    """A document a file, or a file cut at every separator. What lies between two separators is kept as it is."""

    Config: ClassVar[type[ComponentConfig]] = TextConfig

    def __init__(self, config: TextConfig, reading: Reading = Reading()) -> None:  # noqa: B008 (immutable)
        super().__init__(config, find_files(config.paths, reading=reading), reading)
        self._separator = config.separator.encode()

    def read(self, start: Position) -> Iterator[tuple[Position, bytes | None]]:
        if not self._separator:
            for number in range(start.file, len(self.files)):
                self._finished_bytes = sum(file.n_bytes for file in self.files[:number])
                yield Position(number), None
            return
        for number, stream in self._streams(start):
            offset, record = (start.offset, start.record) if number == start.file else (0, 0)
            for piece in self._pieces(stream):
                if piece:
                    yield Position(number, offset, record), piece
                    record += 1
                offset += len(piece) + len(self._separator)

    def _pieces(self, stream: ByteStream) -> Iterator[bytes]:
        """What lies between separators, holding one document in memory."""
        rest = bytearray()
        while block := stream.read(BUFFER_BYTES):
            searched = max(0, len(rest) - len(self._separator) + 1)
            rest += block
            begin = 0
            while (end := rest.find(self._separator, max(begin, searched))) >= 0:
                yield bytes(rest[begin:end])
                begin = end + len(self._separator)
            del rest[:begin]
        if rest:
            yield bytes(rest)

    def parse(self, position: Position, record: bytes | None) -> Document:
        file = self.files[position.file]
        if record is None:
            with ByteStream(file, reading=self.reading) as stream:
                record = b"".join(iter(lambda: stream.read(BUFFER_BYTES), b""))
        try:
            text = record.decode()
        except UnicodeDecodeError as error:
            at = position.offset + error.start
            raise data_error(f"is not UTF-8: {error.reason} at byte {at} of the text", file=file.url) from error
        return Document(file.name if not self._separator else f"{file.name}:{position.record + 1}", text)
