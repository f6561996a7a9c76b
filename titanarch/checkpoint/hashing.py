"""The SHA-256 of what is written, taken on its way to the file, and how processes share out the reading of it."""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written: its size, and its SHA-256 in hex, "" where it was written before these were kept."""

    bytes: int
    sha256: str


class HashingStream:
    """A stream for writing from start to end that counts and hashes what passes. What torch writes a checkpoint with."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: Any) -> int:
        """``data``: anything with a contiguous buffer. Returns its bytes."""
        with memoryview(data) as view, view.cast("B") as flat:
            self._stream.write(flat)
            self._hash.update(flat)
            self._bytes += flat.nbytes
            return flat.nbytes

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()

    @property
    def record(self) -> FileRecord:
        """Of all that was written so far."""
        return FileRecord(self._bytes, self._hash.hexdigest())


Create = Callable[[str | os.PathLike[str], str], AbstractContextManager[Any]]


class FileRecords:
    """What a process wrote: records by file name, of files that were written to their end."""

    def __init__(self) -> None:
        self.written: dict[str, FileRecord] = {}

    @contextmanager
    def stream(self, create: Create, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """What ``create`` opens, hashed where it is opened for writing."""
        with create(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            hashing = HashingStream(stream)
            yield hashing
        self.written[os.path.basename(path)] = hashing.record

    def renamed(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self.written[os.path.basename(new_path)] = self.written.pop(os.path.basename(path))


CHUNK_BYTES = 4 * 2**20


def sha256_of(stream: BinaryIO | io.BufferedIOBase) -> str:
    """The SHA-256 of what is left of a stream, in hex; holds a few MB of it at a time."""
    digest = hashlib.sha256()
    while chunk := stream.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def shares(files: Mapping[str, FileRecord], count: int) -> list[list[str]]:
    """Names of the files by process, each file with one of ``count``, such that all have about as many bytes to read."""
    parts: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name, record in sorted(files.items(), key=lambda item: (-item[1].bytes, item[0])):
        least = loads.index(min(loads))
        parts[least].append(name)
        loads[least] += record.bytes
    return parts
