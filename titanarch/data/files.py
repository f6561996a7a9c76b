"""Files found, read as streams of bytes; gzip and zstandard are unpacked by their suffix."""

import hashlib
import io
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any

from titanarch.data.checksums import add_pieces
from titanarch.data.errors import DamagedFile, UnreachableFile, UnreadableFile, data_error
from titanarch.data.listing import DataFile, data_file, filesystem, is_local
from titanarch.data.packed import PACKED_BYTES, Damaged, is_packed, unpacked_blocks
from titanarch.data.read_ahead import ReadAhead
from titanarch.data.remote import RemoteFile, replaced
from titanarch.data.retry import Reading

logger = logging.getLogger(__name__)

BUFFER_BYTES = 1 << 20


class _Blocks(io.RawIOBase):
    """An iterator of blocks as a file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        n = min(len(buffer), len(self._rest))
        buffer[:n], self._rest = self._rest[:n], self._rest[n:]
        return n


class ByteStream:
    """One file's unpacked bytes from ``offset`` on. A plain file is sought; a packed one is read up to there.

    A remote file is read ahead by a thread, which ends with the stream. Raises DamagedFile, UnreachableFile and DataError,
    which name the file, the place in it, and the line if the caller keeps ``line`` up to date.
    """

    def __init__(self, file: DataFile, *, offset: int = 0, reading: Reading = Reading()) -> None:  # noqa: B008 (immutable)
        self.file = file
        self.line: int | None = None
        self._raw = open_random_access(file, reading)
        if not is_packed(file.url):
            self._raw.seek(offset)
            offset = 0
        elif offset:
            logger.info("%s is packed: its first %d bytes are unpacked again to go on after them", file.url, offset)
        blocks = self._checked_blocks()
        self._ahead = ReadAhead(blocks, n_bytes=reading.read_ahead_bytes) if reading.read_ahead_bytes and not is_local(file.url) else None
        self._stream = io.BufferedReader(_Blocks(self._ahead or blocks), BUFFER_BYTES)
        try:
            self._skip(offset)
        except BaseException:
            self.close()
            raise

    def _skip(self, n_bytes: int) -> None:
        while n_bytes > 0:
            skipped = len(self.read(min(n_bytes, BUFFER_BYTES)))
            if skipped == 0:
                raise data_error("is shorter than where reading was to go on: was it replaced?", file=self.file.url)
            n_bytes -= skipped

    def _checked_blocks(self) -> Iterator[bytes]:
        try:
            yield from unpacked_blocks(self._raw, self.file.url)
        except Damaged as error:
            message = f"cannot be read on, it is truncated or damaged: {error} (by byte {self._raw.tell()} of {self.file.n_bytes} stored)"
            raise data_error(message, file=self.file.url, kind=DamagedFile) from error
        except OSError as error:
            message = f"cannot be read at byte {self._raw.tell()}: {error}"
            raise data_error(message, file=self.file.url, kind=UnreachableFile) from error

    def readline(self) -> bytes:
        """The next line with its end; at the end nothing."""
        try:
            return self._stream.readline()
        except UnreadableFile as error:
            raise self._at_line(error) from error.__cause__

    def read(self, n_bytes: int) -> bytes:
        """At least one byte and at most ``n_bytes``; at the end nothing. What precedes damage is given before it is raised."""
        try:
            return self._stream.read1(n_bytes)
        except UnreadableFile as error:
            raise self._at_line(error) from error.__cause__

    def _at_line(self, error: UnreadableFile) -> UnreadableFile:
        return type(error)(replace(error.problems[0], line=self.line))

    @property
    def stored_bytes_read(self) -> int:
        """How far the stored file has been read, in bytes as stored."""
        return self._raw.tell()

    def close(self) -> None:
        """Close the file, and end the thread that reads it ahead."""
        if self._ahead is not None:
            self._raw.raw.cancel()
            self._ahead.close()
        self._stream.close()
        self._raw.close()

    def __enter__(self) -> "ByteStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def samples_checksum(files: Iterable[DataFile]) -> str:
    """A hash of pieces spread over each local file, and of the stamp of each remote one, which a replacement changes."""
    digest = hashlib.sha256()
    for file in files:
        if not is_local(file.url):
            digest.update(file.stamp.encode())
            continue
        with open_random_access(file, Reading()) as raw:
            add_pieces(digest, raw, file.n_bytes)
    return digest.hexdigest()


def open_random_access(file: DataFile, reading: Reading) -> Any:
    """The stored file, buffered and seekable. Raises DataError where it was replaced since it was found, and UnreachableFile."""
    if not is_local(file.url):
        return io.BufferedReader(RemoteFile(file, reading), PACKED_BYTES)
    fs, path = filesystem(file.url, "")
    try:
        found = data_file(fs, fs.info(path))
        raw = fs.open(path, "rb")
    except OSError as error:
        raise data_error(f"cannot be read: {error}", file=file.url, kind=UnreachableFile) from error
    if found != file:
        raise replaced(file, found)
    return raw
