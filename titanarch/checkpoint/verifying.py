"""Whether a committed checkpoint may be trusted: its files are compared with its marker before anything of it is loaded."""

import hashlib
from collections.abc import Mapping, Sequence

from titanarch.checkpoint.config import Verification
from titanarch.checkpoint.errors import CheckpointError
from titanarch.checkpoint.hashing import FileRecord, shares
from titanarch.checkpoint.marker import Marker
from titanarch.checkpoint.processes import Processes
from titanarch.checkpoint.storage import Storage
from titanarch.checkpoint.torch_io import METADATA, files_of, read_index


def problem_of(storage: Storage, folder: str, marker: Marker) -> str:
    """Why a committed checkpoint is damaged, as far as sizes and the index tell; empty where they tell nothing.

    A symbolic link that leads out of the folder is refused, and so is an index that names another folder's file.
    """
    try:
        link = storage.link_outside(folder)
        if link:
            return f"{link} is a symbolic link to outside the checkpoint, which is not read"
        problem = marker.problem(storage.sizes(folder))
        if problem:
            return problem
        if METADATA not in marker.files:
            return f"the marker does not list {METADATA}"
        data = storage.index_bytes(folder)
        expected = marker.files[METADATA].sha256
        if expected and hashlib.sha256(data).hexdigest() != expected:
            return _differs(METADATA)
        stray = files_of(read_index(data, storage.path(f"{folder}/{METADATA}"))) - marker.files.keys()
    except (CheckpointError, OSError) as error:
        return str(error)
    return f"its index names {sorted(stray)[0]}, which is no file of the checkpoint" if stray else ""


def verify(storage: Storage, folder: str, marker: Marker, *, how: Verification, processes: Processes) -> str:
    """Why a committed checkpoint is damaged; empty where it is sound. Collective: the same on all processes.

    With checksums the processes share the files out, and each reads its own. A checkpoint of format 1 has none, and its
    sizes are all that is compared.
    """
    problem = processes.from_first(lambda: problem_of(storage, folder, marker))
    if problem or how == "sizes" or not marker.has_checksums:
        return problem
    own = shares(marker.files, processes.count)[processes.rank]
    return next((found for found in processes.gather(_damage(storage, folder, own, marker.files)) if found), "")


def _damage(storage: Storage, folder: str, names: Sequence[str], files: Mapping[str, FileRecord]) -> str:
    """What is wrong with the first of ``names`` whose content is not what was committed."""
    for name in names:
        try:
            if storage.sha256(folder, name) != files[name].sha256:
                return _differs(name)
        except OSError as error:
            return f"the file {name} cannot be read: {error}"
    return ""


def _differs(name: str) -> str:
    return f"the file {name} is damaged: its SHA-256 is not the committed one"
