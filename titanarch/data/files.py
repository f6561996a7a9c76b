"""Files behind fsspec URLs, read as streams of bytes; gzip and zstandard are unpacked by their suffix."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from titanarch.data.errors import DataError, data_error

BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class DataFile:
    """A file found: its URL, its size as stored in bytes, and a stamp that changes when it is replaced."""

    url: str
    n_bytes: int
    stamp: str

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]


def find_files(patterns: Iterable[str], *, key: str = "data.source.paths") -> list[DataFile]:
    """The files that fsspec URLs and globs name: patterns in their order, the matches of a glob sorted, none twice.

    Raises DataError where a pattern names nothing or a folder.
    """
    found: dict[str, DataFile] = {}
    for pattern in patterns:
        fs, path = _filesystem(pattern, key)
        is_glob = any(character in path for character in "*?[")
        try:
            infos = [fs.info(match) for match in (sorted(fs.glob(path)) if is_glob else [path])]
        except FileNotFoundError as error:
            raise data_error("the file does not exist", file=pattern, key=key) from error
        except OSError as error:
            raise data_error(f"cannot be read: {error}", file=pattern, key=key) from error
        if not is_glob and infos[0]["type"] == "directory":
            raise data_error(f"is a folder; name its files, such as '{pattern.rstrip('/')}/*'", file=pattern, key=key)
        files = [_data_file(fs, info) for info in infos if info["type"] == "file"]
        if not files:
            raise data_error("no file matches", file=pattern, key=key)
        found.update({file.url: file for file in files if file.url not in found})
    return list(found.values())


def _filesystem(url: str, key: str) -> tuple[Any, str]:
    try:
        return url_to_fs(url)
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is not installed
        raise data_error(str(error), file=url, key=key) from error


def _data_file(fs: Any, info: dict[str, Any]) -> DataFile:
    stamps = [str(info[name]) for name in ("mtime", "LastModified", "last_modified", "updated", "ETag", "etag") if name in info]
    local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
    return DataFile(url=info["name"] if local else fs.unstrip_protocol(info["name"]), n_bytes=info["size"] or 0, stamp=" ".join(stamps))


class _ZstandardReader(io.RawIOBase):
    """Unpacks zstandard frames. The package's own reader ends a truncated file without a word."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard  # only where a .zst file is read

        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._raw, self._frame, self._packed, self._plain = raw, self._new_frame(), b"", b""
        self._in_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            packed = self._packed or self._raw.read(BUFFER_BYTES // 8)
            self._packed = b""
            if not packed:
                if self._in_frame:
                    raise EOFError("the file ends inside a zstandard frame")
                return 0
            self._unpack(packed)
        n = min(len(buffer), len(self._plain))
        buffer[:n], self._plain = self._plain[:n], self._plain[n:]
        return n

    def _unpack(self, packed: bytes) -> None:
        try:
            self._plain = self._frame.decompress(packed)
        except self._error as error:
            raise OSError(str(error)) from error
        self._in_frame = not self._frame.eof
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, self._new_frame()


class ByteStream:
    """One file's unpacked bytes from ``offset`` on. A plain file is sought; a packed one is read up to there.

    Every failure to read is a DataError that names the file, and the line if the caller keeps ``line`` up to date.
    """

    def __init__(self, file: DataFile, *, offset: int = 0) -> None:
        self.file = file
        self.line: int | None = None
        fs, path = _filesystem(file.url, "")
        try:
            self._raw: Any = fs.open(path, "rb")
        except OSError as error:
            raise self._failed(error) from error
        if file.url.endswith(".gz"):
            unpacked: Any = gzip.GzipFile(fileobj=self._raw, mode="rb")
        elif file.url.endswith((".zst", ".zstd")):
            unpacked = _ZstandardReader(self._raw)
        else:
            unpacked, offset = self._raw, self._raw.seek(offset) - offset
        self._stream = io.BufferedReader(unpacked, BUFFER_BYTES)
        while offset > 0:
            skipped = len(self.read(min(offset, BUFFER_BYTES)))
            if skipped == 0:
                raise data_error("is shorter than where reading was to go on: was it replaced?", file=file.url)
            offset -= skipped

    def readline(self) -> bytes:
        try:
            return self._stream.readline()
        except (OSError, EOFError, zlib.error) as error:
            raise self._failed(error) from error

    def read(self, n_bytes: int = -1) -> bytes:
        try:
            return self._stream.read(n_bytes)
        except (OSError, EOFError, zlib.error) as error:
            raise self._failed(error) from error

    @property
    def stored_bytes_read(self) -> int:
        """How far the stored file has been read, in bytes as stored."""
        return self._raw.tell()

    def _failed(self, error: Exception) -> DataError:
        return data_error(f"cannot be read on, it is truncated or damaged: {error}", file=self.file.url, line=self.line)

    def __enter__(self) -> "ByteStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()
        self._raw.close()


def open_random_access(file: DataFile) -> Any:
    """The stored file for a library that seeks in it."""
    fs, path = _filesystem(file.url, "")
    try:
        return fs.open(path, "rb")
    except OSError as error:
        raise data_error(f"cannot be read: {error}", file=file.url) from error


def is_local(url: str) -> bool:
    """Whether ``url`` is a path of this machine."""
    return fsspec.utils.get_protocol(url) in ("file", "local")


def sha256_of(path: Path) -> str:
    """The checksum of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BUFFER_BYTES):
            digest.update(block)
    return digest.hexdigest()
