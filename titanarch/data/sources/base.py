"""What a source of text is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from titanarch.config.registry import ComponentConfig, Registry
from titanarch.data.errors import DataError, ReplacedFile, UnreachableFile, UnreadableFile
from titanarch.data.files import ByteStream
from titanarch.data.listing import DataFile
from titanarch.data.retry import Reading
from titanarch.data.skips import Skips

Split = Literal["train", "validation"]


class SourceConfig(ComponentConfig):
    """The table of a source."""


class FilesConfig(SourceConfig):
    """The table of a source that reads files."""

    on_error: Literal["stop", "skip"] = Field(
        "stop", description="a malformed document, or a file that cannot be read on: stop the run, or skip it, counted and logged"
    )


class Document(NamedTuple):
    """A text with its name. ``split`` is set where the source itself says which split it belongs to."""

    id: str
    text: str
    split: Split | None = None


class Position(NamedTuple):
    """Where a document begins: number of the file, byte offset in the unpacked file, number of the record in it."""

    file: int = 0
    offset: int = 0
    record: int = 0


def half_of_pair(text: str) -> str:
    """What is wrong with a text that has half of a surrogate pair, which JSON can spell and UTF-8 cannot; else empty."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"is no text: its character {error.start} is half of a surrogate pair, \\u{ord(text[error.start]):04x}"
    return ""


class Source(ABC):
    """Documents, of text or tokenized already."""

    Config: ClassVar[type[ComponentConfig]]
    splits_itself: ClassVar[bool] = False  # documents carry their split, so none need be held out

    def __init__(self, config: ComponentConfig, reading: Reading = Reading()) -> None:  # noqa: B008 (immutable)
        self.config = config
        self.reading = reading


class TextSource(Source):
    """Documents of text, read as a stream in an order that never changes.

    ``read`` is cheap: what it gives is turned into a document by ``parse`` only if it is wanted. ``records`` and ``document``
    are these two with what cannot be read passed over, where the source has on_error = "skip", and noted in ``skips``.
    """

    def __init__(self, config: ComponentConfig, files: list[DataFile], reading: Reading = Reading()) -> None:  # noqa: B008 (immutable)
        super().__init__(config, reading)
        self.files = files
        self.skips_errors = isinstance(config, FilesConfig) and config.on_error == "skip"
        self.skips = Skips()
        self._finished_bytes = 0
        self._stream: ByteStream | None = None

    @abstractmethod
    def read(self, start: Position) -> Iterator[tuple[Position, Any]]:
        """Each document from the one at ``start`` on: where it begins, and what ``parse`` takes.

        Raises DataError with file and line where the data cannot be read.
        """

    @abstractmethod
    def parse(self, position: Position, record: Any) -> Document:
        """The document at ``position``. Raises DataError with file and line where it is malformed."""

    def text(self, position: Position, record: Any) -> str:
        """The text of ``parse`` alone, for sources that find it faster."""
        return self.parse(position, record).text

    def records(self, start: Position, *, unreachable: bool) -> Iterator[tuple[Position, Any]]:
        """As ``read``; where errors are skipped, so is the rest of a damaged file, with ``unreachable`` also of one the storage gave up."""
        while start.file < len(self.files):
            last = start
            try:
                for position, record in self.read(start):
                    last = position
                    yield position, record
                return
            except UnreadableFile as error:
                if not self.skips_errors or (isinstance(error, UnreachableFile) and not unreachable):
                    raise
                url = str(error.problems[0].file)
                number = next(i for i, file in enumerate(self.files) if file.url == url)
                place = (last.offset, last.record) if last.file == number else (0, 0)
                self.skips.add_rest(url, place, error)
                start = Position(number + 1)

    def document(self, position: Position, record: Any, *, unreachable: bool) -> Document | None:
        """As ``parse``; None where errors are skipped and the document is malformed, or is a file that ``records`` would skip."""
        try:
            return self.parse(position, record)
        except DataError as error:
            if not self.skips_errors or isinstance(error, ReplacedFile) or (isinstance(error, UnreachableFile) and not unreachable):
                raise
            self.skips.add_document(self.files[position.file].url, (position.offset, position.record), error)
            return None

    def identity(self) -> list[Any]:
        """What changes whenever the documents may have changed; JSON."""
        return [self._config_json(), [[file.url, file.n_bytes, file.stamp] for file in self.files]]

    def content(self) -> list[Any]:
        """What the documents are as far as names and sizes of files tell, without where they lie; JSON."""
        return [self._config_json("paths"), [[file.name, file.n_bytes] for file in self.files]]

    def _config_json(self, *exclude: str) -> dict[str, Any]:
        """The table; without on_error where it stops, which changes no document."""
        return self.config.model_dump(mode="json", exclude={*exclude} if self.skips_errors else {*exclude, "on_error"})

    @property
    def stored_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)

    @property
    def stored_bytes_read(self) -> int:
        """How much of ``stored_bytes`` the running ``read`` has gone through, for a progress bar."""
        return self._finished_bytes + (self._stream.stored_bytes_read if self._stream is not None else 0)

    def _streams(self, start: Position) -> Iterator[tuple[int, ByteStream]]:
        """Each file from ``start`` on, opened at its place in turn."""
        self._finished_bytes = sum(file.n_bytes for file in self.files[: start.file])
        for number in range(start.file, len(self.files)):
            file = self.files[number]
            with ByteStream(file, offset=start.offset if number == start.file else 0, reading=self.reading) as stream:
                self._stream = stream
                try:
                    yield number, stream
                finally:  # also where reading is given up half-way
                    self._stream = None
            self._finished_bytes += file.n_bytes


SOURCES: Registry[Source] = Registry("source")
