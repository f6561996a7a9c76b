"""What torch reads and writes checkpoints with, such that a checkpoint is never trusted.

``torch.distributed.checkpoint`` writes its index as a pickle, and a pickle can run any code when it is read. Only
the classes that an index is made of may be named in it here; anything else is refused. The tensors themselves are
read by torch with ``weights_only=True``, and our plain values are JSON (``values.py``), so loading a checkpoint
runs no code of the checkpoint.
"""

import collections
import io
import os
import pathlib
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem as FsspecFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from titanarch.checkpoint.errors import CheckpointError, root_os_error
from titanarch.checkpoint.hashing import FileRecord, FileRecords

METADATA = ".metadata"

_ALLOWED: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
        collections.OrderedDict,
        pathlib.PosixPath,
    )
} | {
    ("pathlib", "PosixPath"): pathlib.PosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PosixPath,  # where Python 3.13 keeps it
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}


_BROKEN_PICKLE = (
    *(pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError),
    *(TypeError, ValueError, KeyError, OverflowError, MemoryError, RuntimeError),
)
"""A damaged pickle may raise almost anything: the first are what the pickle module documents, the others what broken arguments give."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint index holds; the file is not to be trusted")


def read_index(data: bytes, path: str) -> Metadata:
    """The index of a checkpoint from the bytes of its ``.metadata``; CheckpointError where it is none or not to be trusted."""
    try:
        index = _IndexUnpickler(io.BytesIO(data)).load()
        sound = _is_index(index)  # an object whose state was damaged may lack any attribute
    except _BROKEN_PICKLE as error:
        raise CheckpointError(f"{path}: refused: {error}") from error
    if not sound:
        raise CheckpointError(f"{path}: refused: it is no checkpoint index")
    assert isinstance(index, Metadata), "it was looked at"
    return index


def _is_index(index: object) -> bool:
    """Whether an object is an index with the parts that are read of it."""
    if not isinstance(index, Metadata):
        return False
    tables = (index.state_dict_metadata, index.storage_data)
    return all(isinstance(table, dict) for table in tables) and all(
        isinstance(info, filesystem._StorageInfo) and isinstance(info.relative_path, str) for info in index.storage_data.values()
    )


def files_of(index: Metadata) -> set[str]:
    """Names of the files that an index says the tensors lie in."""
    return {info.relative_path for info in index.storage_data.values()}


class _CheckedRead:
    """Gives torch the index that was checked, so that it never unpickles the file itself."""

    index: Metadata

    def read_metadata(self) -> Metadata:
        return self.index


class LocalReader(_CheckedRead, FileSystemReader):
    """Reads a folder. Set ``index`` before use."""


class UrlReader(_CheckedRead, FsspecReader):
    """Reads an fsspec URL. Set ``index`` before use."""


@contextmanager
def alone() -> Iterator[None]:
    """For a command of one process: torch does not warn that it is one. Not for threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


class _Recording:
    """A file system of torch's that keeps a record of every file that it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.records = FileRecords()

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with self.records.stream(super().create_stream, path, mode) as stream:  # type: ignore[misc]
            yield stream

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)  # type: ignore[misc]
        self.records.renamed(path, new_path)


class _RecordingLocal(_Recording, FileSystem):
    """Folders."""


class _RecordingFsspec(_Recording, FsspecFileSystem):
    """fsspec URLs."""


@dataclass(frozen=True)
class _FilesWritten(WriteResult):
    """What a process wrote, on its way to process 0 beside the places of its tensors; it is none of those itself."""

    files: Mapping[str, FileRecord]


@dataclass
class _RecordedMeta(StorageMeta):
    """Carries the records of all files out of a save, from another process too; the index on disk holds none of it."""

    files: dict[str, FileRecord] = field(default_factory=dict)


class _RecordedWrite:
    """A writer whose save returns a record of every file, and that raises the OSError which stopped it.

    torch buries that error, and drops its cause between processes.
    """

    records: FileRecords

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            results = super().write_data(plan, planner).value()  # type: ignore[misc]
        except Exception as error:
            cause = root_os_error(error)
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror, cause.filename) from error
        own = _FilesWritten(MetadataIndex(""), 0, None, dict(self.records.written))
        done: Future[list[WriteResult]] = Future()
        done.set_result([*results, own])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, FileRecord] = {}
        for result in (result for part in results for result in part):
            if isinstance(result, _FilesWritten):
                files.update(result.files)
        places = [[result for result in part if not isinstance(result, _FilesWritten)] for part in results]
        super().finish(metadata, places)  # type: ignore[misc]
        metadata.storage_meta = _RecordedMeta(files=files | self.records.written)


class LocalWriter(_RecordedWrite, FileSystemWriter):
    """Writes a folder."""

    def __init__(self, path: str) -> None:
        """``path``: a folder that holds no checkpoint, or does not exist."""
        super().__init__(path, overwrite=False)
        files = _RecordingLocal()
        self.fs, self.records = files, files.records


class UrlWriter(_RecordedWrite, FsspecWriter):
    """Writes below an fsspec URL."""

    def __init__(self, path: str) -> None:
        """``path``: a URL below which no checkpoint lies."""
        super().__init__(path, sync_files=False, overwrite=False)
        files = _RecordingFsspec()
        self.fs = files  # type: ignore[assignment]  # torch does the same
        self.records, self.path = files.records, files.init_path(path)


def records_of(saved: Metadata) -> dict[str, FileRecord]:
    """Every file by name, from what a save with one of these writers returned."""
    assert isinstance(saved.storage_meta, _RecordedMeta), "the writer was one of these"
    return saved.storage_meta.files


class TensorsOnlyPlanner(DefaultLoadPlanner):
    """Loads tensors, and refuses pickled objects, which torch would read without ``weights_only``."""

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None, "torch sets the metadata before it asks for a plan"
        for name in self.state_dict:
            if not isinstance(self.metadata.state_dict_metadata.get(name), metadata.TensorStorageMetadata):
                raise CheckpointError(f"'{name}' is no tensor in the checkpoint; pickled objects are never read")
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"'{read_item.dest_index.fqn}' is a pickled object in the checkpoint; these are never read")
