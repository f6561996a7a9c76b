"""Where checkpoints lie: the one file that touches their storage, a folder or an fsspec URL."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import StorageReader

from titanarch.checkpoint.errors import CheckpointError
from titanarch.checkpoint.hashing import CHUNK_BYTES, sha256_of
from titanarch.checkpoint.marker import MARKER, Marker
from titanarch.checkpoint.torch_io import METADATA, LocalReader, LocalWriter, UrlReader, UrlWriter, read_index
from titanarch.config.errors import ConfigError

_BUCKETS = ("s3", "s3a", "gs", "gcs")  # where making a folder would make a bucket, of a misspelt name too
_FOLDER = re.compile(r"step-(\d{8,})(?:-\d+)?")


def folder_name(step: int, attempt: int) -> str:
    """``step-00000100``; a later attempt of the same step, next to a committed one, gets ``-1``, ``-2`` ..."""
    return f"step-{step:08d}" + (f"-{attempt}" if attempt else "")


def step_of(folder: str) -> int | None:
    """The step in the name of a checkpoint's folder; None where it is no such name."""
    match = _FOLDER.fullmatch(folder)
    return int(match[1]) if match else None


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """What a package of a remote storage raises of its own, such as missing credentials, as an OSError, which is handled everywhere."""
    try:
        yield
    except (OSError, ValueError, CheckpointError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class Storage:
    """The checkpoints below one location; ``folder`` is always the name of one checkpoint."""

    def __init__(self, location: str | Path) -> None:
        self.location = str(location).rstrip("/")
        self.is_url = "://" in self.location
        try:
            self._fs, self._root = url_to_fs(self.location)
        except (ImportError, ValueError) as error:
            remedy = "install the extra of titanarch that reads it (s3, gcs), or correct the URL"
            raise ConfigError(f"{self.location} cannot be opened: {error}; {remedy}") from error

    def path(self, folder: str) -> str:
        """The place of a checkpoint as a user writes it."""
        return f"{self.location}/{folder}"

    def _inside(self, folder: str, name: str = "") -> str:
        return "/".join(part for part in (self._root.rstrip("/"), folder, name) if part)

    @_as_os_errors()
    def folders(self) -> list[str]:
        """Names of the checkpoints' folders, committed or not, sorted."""
        self._fs.invalidate_cache()
        if not self._fs.isdir(self._root):
            return []
        names = (os.path.basename(path.rstrip("/")) for path in self._fs.ls(self._root, detail=False))
        return sorted(name for name in names if step_of(name) is not None)

    @_as_os_errors()
    def is_committed(self, folder: str) -> bool:
        return bool(self._fs.exists(self._inside(folder, MARKER)))

    @_as_os_errors()
    def marker(self, folder: str) -> Marker:
        """The commit marker; ValueError says what is wrong with it."""
        return Marker.from_bytes(self._fs.cat_file(self._inside(folder, MARKER)))

    @_as_os_errors()
    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file of a checkpoint, by name, without the marker."""
        self._fs.invalidate_cache()
        start = self._inside(folder)
        found = self._fs.find(start, detail=True)
        prefix = len(self._fs._strip_protocol(start).rstrip("/")) + 1
        return {path[prefix:]: entry["size"] for path, entry in sorted(found.items()) if path[prefix:] != MARKER}

    @_as_os_errors()
    def sha256(self, folder: str, name: str) -> str:
        """The SHA-256 of a file of a checkpoint, read in pieces; hex."""
        with self._fs.open(self._inside(folder, name), "rb", block_size=CHUNK_BYTES) as stream:
            return sha256_of(stream)

    def link_outside(self, folder: str) -> str:
        """The name of a file of a checkpoint that is a symbolic link to elsewhere, or ""; only disks have such links."""
        if not isinstance(self._fs, LocalFileSystem):
            return ""
        home = os.path.realpath(self._inside(folder))
        for parent, folders, names in os.walk(self._inside(folder)):
            for name in (*folders, *names):
                path = os.path.join(parent, name)
                if os.path.islink(path) and not os.path.realpath(path).startswith(home + os.sep):
                    return os.path.relpath(path, self._inside(folder))
        return ""

    @_as_os_errors()
    def exists(self) -> bool:
        """Whether there is anything at the location."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._root))

    @_as_os_errors()
    def remove_all(self) -> None:
        """Delete the location with everything in it."""
        if self.exists():
            self._fs.rm(self._root, recursive=True)

    def why_not_writable(self, name: str) -> str:
        """Why a file cannot be written and removed here, "" where it can; ``name`` tells those who try at once apart."""
        path = self._inside(f".writable-{name}")
        try:
            self._try_writing(path)
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    @_as_os_errors()
    def _try_writing(self, path: str) -> None:
        if self.location.partition("://")[0] not in _BUCKETS:
            self._fs.makedirs(self._root, exist_ok=True)
        self._fs.pipe_file(path, b"titanarch")
        self._fs.rm_file(path)

    @_as_os_errors()
    def write_marker(self, folder: str, marker: Marker) -> None:
        """Commit: the marker appears whole or not at all, and after everything else."""
        path = self._inside(folder, MARKER)
        if self.is_url:
            self._fs.pipe_file(path, marker.to_bytes())  # one put; a torn one is no JSON and does not count
            return
        _sync_folder(Path(self._inside(folder)))
        temporary = Path(path + ".tmp")
        with temporary.open("wb") as stream:
            stream.write(marker.to_bytes())
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
        _sync_folder(temporary.parent)

    @_as_os_errors()
    def remove(self, folder: str) -> None:
        """Delete a checkpoint, its marker first, so that a kill on the way leaves nothing that counts."""
        if self.is_committed(folder):
            self._fs.rm_file(self._inside(folder, MARKER))
        if self._fs.exists(self._inside(folder)):
            self._fs.rm(self._inside(folder), recursive=True)

    def writer(self, folder: str) -> LocalWriter | UrlWriter:
        """What torch writes a checkpoint with; it refuses a folder that holds one."""
        if self.is_url:
            return UrlWriter(self.path(folder))
        return LocalWriter(self.path(folder))

    def index(self, folder: str) -> Metadata:
        """The checked index of a checkpoint; CheckpointError where it cannot be read."""
        return read_index(self.index_bytes(folder), f"{self.path(folder)}/{METADATA}")

    @_as_os_errors()
    def index_bytes(self, folder: str) -> bytes:
        """The file that holds the index, not to be trusted."""
        data: bytes = self._fs.cat_file(self._inside(folder, METADATA))
        return data

    def reader(self, folder: str, index: Metadata) -> StorageReader:
        """What torch reads a checkpoint with; ``index`` is its checked index."""
        reader = UrlReader(self.path(folder)) if self.is_url else LocalReader(self.path(folder))
        reader.index = index
        return reader


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
