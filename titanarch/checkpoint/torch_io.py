"""What torch reads and writes checkpoints with, such that a checkpoint is never trusted.

``torch.distributed.checkpoint`` writes its index as a pickle, and a pickle can run any code when it is read. Only
the classes that an index is made of may be named in it here; anything else is refused. The tensors themselves are
read by torch with ``weights_only=True``, and our plain values are JSON (``values.py``), so loading a checkpoint
runs no code of the checkpoint.
"""

import collections
import io
import pathlib
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from titanarch.checkpoint.errors import CheckpointError, root_os_error

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
    # A damaged pickle may raise almost anything: these are what the pickle module documents, and what broken arguments give.
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: refused: {error}") from error
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise CheckpointError(f"{path}: refused: it is no checkpoint index")
    return index


class _CheckedRead:
    """Gives torch the index that was checked, so that it never unpickles the file itself."""

    index: Metadata

    def read_metadata(self) -> Metadata:
        return self.index


class LocalReader(_CheckedRead, FileSystemReader):
    """Reads a folder. Set ``index`` before use."""


class UrlReader(_CheckedRead, FsspecReader):
    """Reads an fsspec URL. Set ``index`` before use."""


class _PlainWrite:
    """Raises the OSError that stopped a write, which torch buries (and drops between processes)."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)  # type: ignore[misc]
        except Exception as error:
            cause = root_os_error(error)
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror, cause.filename) from error


class LocalWriter(_PlainWrite, FileSystemWriter):
    """Writes a folder."""


class UrlWriter(_PlainWrite, FsspecWriter):
    """Writes below an fsspec URL."""


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
