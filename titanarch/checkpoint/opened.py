"""A checkpoint whose tensors are read one at a time, without a model, and whose files have been verified."""

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from titanarch.checkpoint.choosing import find
from titanarch.checkpoint.errors import CheckpointError, load_failed
from titanarch.checkpoint.loading import values_name
from titanarch.checkpoint.marker import Marker
from titanarch.checkpoint.processes import Processes
from titanarch.checkpoint.storage import Storage
from titanarch.checkpoint.torch_io import TensorsOnlyPlanner, alone
from titanarch.checkpoint.values import TreePath, decode


class OpenCheckpoint:
    """Committed and read from one process.

    Attributes:
        path: its place as a user writes it.
        marker: what was committed.
        tensors: shape and dtype of every tensor, by its full name; plain values are not among them.
    """

    def __init__(self, storage: Storage, folder: str, marker: Marker) -> None:
        self.path, self.marker = storage.path(folder), marker
        self._storage, self._folder, self._index = storage, folder, storage.index(folder)
        found = self._index.state_dict_metadata
        objects = [name for name, meta in found.items() if not isinstance(meta, TensorStorageMetadata)]
        if objects:
            raise CheckpointError(f"{self.path} holds pickled objects, which are never read: {', '.join(objects[:5])}")
        stored = {name: meta for name, meta in found.items() if isinstance(meta, TensorStorageMetadata)}
        self._entries = [entry for entry in sorted({name.split(".")[0] for name in stored}) if values_name(entry) in stored]
        self.tensors = {name: stored[name] for name in sorted(stored.keys() - {values_name(entry) for entry in self._entries})}
        self._values = {entry: stored[values_name(entry)] for entry in self._entries}

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU."""
        return self._read(name, self.tensors[name])

    def values(self) -> dict[TreePath, Any]:
        """The plain values of all objects, by path: ("data", "next_row")."""
        trees = {entry: decode(self._read(values_name(entry), meta)) for entry, meta in self._values.items()}
        return {(entry, *path): value for entry, tree in trees.items() for path, value in tree.items()}

    def _read(self, name: str, meta: TensorStorageMetadata) -> Tensor:
        tensor = torch.empty(meta.size, dtype=meta.properties.dtype)
        reader = self._storage.reader(self._folder, self._index)
        try:
            with alone():
                load_tensors({name: tensor}, storage_reader=reader, planner=TensorsOnlyPlanner(), no_dist=True)
        except (CheckpointException, OSError) as error:
            raise load_failed(error, self.path) from error
        return tensor


def open_checkpoint(path: str) -> OpenCheckpoint:
    """The checkpoint at ``path``, or the one committed last in it, after all its checksums were compared.

    ConfigError where there is none, or it is damaged.
    """
    return OpenCheckpoint(*find(path, how="checksums", processes=Processes(timedelta(hours=1))))
