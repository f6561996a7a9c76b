"""Remote files as seekable streams of range reads that are tried again."""

import io
import threading
from typing import Any

from fsspec.asyn import AsyncFileSystem

from titanarch.data.errors import DataError, ReplacedFile, UnreachableFile, data_error
from titanarch.data.listing import DataFile, data_file, filesystem
from titanarch.data.retry import Reading

RANGE_BYTES = 4 << 20  # asked for at once; halved at each failure down to SMALLEST_RANGE_BYTES
SMALLEST_RANGE_BYTES = 256 << 10


class RemoteFile(io.RawIOBase):
    """The stored bytes of ``file``. What was delivered is never asked for again: a read goes on where it broke.

    At its opening, after every failure and at its last bytes the file is compared with its listing. Raises UnreachableFile
    where a read has failed for good, and DataError where the file was replaced or the server has no range reads.
    """

    def __init__(self, file: DataFile, reading: Reading) -> None:
        self.file = file
        self._reading = reading
        self._closing = threading.Event()
        self._fs, self._path = filesystem(file.url, "")
        self._options: dict[str, Any] = {"timeout": reading.retry.timeout_seconds} if isinstance(self._fs, AsyncFileSystem) else {}
        self._position = self._begin = 0
        self._block = b""
        self._reading.persist(lambda _: self._check_unchanged(), url=file.url, offset=0, closing=self._closing)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.file.n_bytes}[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self.file.n_bytes:
            return 0
        place = self._position - self._begin
        if not 0 <= place < len(self._block):
            self._block = b""  # freed before the next one comes
            self._block = self._reading.persist(self._fetch, url=self.file.url, offset=self._position, closing=self._closing)
            self._begin, place = self._position, 0
        n = min(len(buffer), len(self._block) - place)
        buffer[:n] = self._block[place : place + n]
        self._position += n
        return n

    def cancel(self) -> None:
        """Let a read in another thread end at its next failure."""
        self._closing.set()

    def _fetch(self, failures: int) -> bytes:
        if failures:
            self._check_unchanged()
        wanted = max(SMALLEST_RANGE_BYTES, RANGE_BYTES >> failures)
        end = min(self._position + wanted, self.file.n_bytes)
        content = bytes(self._fs.cat_file(self._path, start=self._position, end=end, **self._options))
        n_wanted = end - self._position
        if len(content) > n_wanted:
            message = f"{len(content)} bytes came for the {n_wanted} asked for: the server has no range reads; copy the file"
            raise data_error(message, file=self.file.url, kind=UnreachableFile)
        if len(content) < n_wanted:
            raise OSError(f"{len(content)} bytes came for the {n_wanted} asked for")
        if end == self.file.n_bytes:
            self._check_unchanged()
        return content

    def _check_unchanged(self) -> None:
        self._fs.invalidate_cache(self._path)
        found = data_file(self._fs, self._fs.info(self._path, **self._options))
        if (found.n_bytes, found.stamp) != (self.file.n_bytes, self.file.stamp):
            raise replaced(self.file, found)


def replaced(file: DataFile, found: DataFile) -> DataError:
    """What to raise where ``file`` is ``found`` now."""
    was, now = (f"{each.n_bytes} bytes, {each.stamp or 'no time or checksum'}" for each in (file, found))
    message = f"was replaced while the run had it: {was} when it was listed, {now} now; restore it, or start again"
    return data_error(message, file=file.url, kind=ReplacedFile)
