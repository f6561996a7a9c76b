"""What a source of text is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple

from titanarch.config.registry import ComponentConfig, Registry
from titanarch.data.files import ByteStream, DataFile

Split = Literal["train", "validation"]


class SourceConfig(ComponentConfig):
    """The table of a source."""


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


class Source(ABC):
    """Documents, of text or tokenized already."""

    Config: ClassVar[type[ComponentConfig]]
    splits_itself: ClassVar[bool] = False  # documents carry their split, so none need be held out

    def __init__(self, config: ComponentConfig) -> None:
        self.config = config


class TextSource(Source):
    """Documents of text, read as a stream in an order that never changes.

    ``read`` is cheap: what it gives is turned into a document by ``parse`` only if it is wanted.
    """

    def __init__(self, config: ComponentConfig, files: list[DataFile]) -> None:
        super().__init__(config)
        self.files = files
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

    def identity(self) -> list[Any]:
        """What changes whenever the documents may have changed; JSON."""
        return [self.config.model_dump(mode="json"), [[file.url, file.n_bytes, file.stamp] for file in self.files]]

    def content(self) -> list[Any]:
        """What the documents are as far as names and sizes of files tell, without where they lie; JSON."""
        return [self.config.model_dump(mode="json", exclude={"paths"}), [[file.name, file.n_bytes] for file in self.files]]

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
            with ByteStream(file, offset=start.offset if number == start.file else 0) as stream:
                self._stream = stream
                try:
                    yield number, stream
                finally:  # also where reading is given up half-way
                    self._stream = None
            self._finished_bytes += file.n_bytes


SOURCES: Registry[Source] = Registry("source")
