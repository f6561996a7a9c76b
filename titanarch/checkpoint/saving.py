"""Copying a state, writing it to a fresh folder, committing it, and removing old checkpoints."""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE, Metadata
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save, save

from titanarch.checkpoint.errors import CheckpointError, save_failed
from titanarch.checkpoint.hashing import FileRecord
from titanarch.checkpoint.loading import State, leaves_of, values_name
from titanarch.checkpoint.marker import Marker
from titanarch.checkpoint.processes import Processes
from titanarch.checkpoint.retention import Retention, superfluous
from titanarch.checkpoint.storage import Storage, folder_name
from titanarch.checkpoint.torch_io import LocalWriter, UrlWriter, records_of
from titanarch.checkpoint.values import encode

logger = logging.getLogger(__name__)


def collect(state: State, processes: Processes) -> dict[str, Tensor]:
    """All tensors of a state by full name, plain values encoded; they share memory with the state. Collective.

    CheckpointError where an object's plain values differ between processes: one of them would be lost.
    """
    tensors: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    for entry, value in state.items():
        leaves = leaves_of(entry, value)
        tensors |= {name: leaf for name, (_, leaf) in leaves.items() if isinstance(leaf, Tensor)}
        values = encode(dict(leaves.values()))
        tensors[values_name(entry)] = values
        digests[entry] = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    differing = {entry for other in processes.gather(digests) for entry, _ in other.items() ^ digests.items()}
    if differing:
        raise CheckpointError(
            f"the plain values of {', '.join(sorted(differing))} differ between processes, and a checkpoint keeps one copy; "
            "merge per-process state with Checkpointer.merge, or take it from process 0"
        )
    return tensors


class Staging:
    """Copies of a state on the CPU, one at a time, in memory that another process can map where ``shared``.

    The memory is kept from one copy to the next, for the system takes about as long to hand out fresh pages as the copy
    itself. So a copy is valid until the next one: its upload must have ended by then.
    """

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared
        self._stager = DefaultStager(
            StagingOptions(use_pinned_memory=False, use_shared_memory=shared, use_async_staging=False, use_non_blocking_copy=False)
        )

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A copy, finished on return: made in the background, the next optimizer step would write in place and tear it."""
        try:
            staged = self._stager.stage(tensors)
        except RuntimeError as error:
            if not self._shared:
                raise
            raise CheckpointError(
                f"no shared memory for a copy of the state ({error}); enlarge /dev/shm or use checkpoint.async_mode = 'async'"
            ) from error
        assert isinstance(staged, dict), "a stager that does not stage in the background returns the copy"
        return staged

    def close(self) -> None:
        """Give the memory back."""
        self._stager.close()


@dataclass(frozen=True)
class Commit:
    """What goes into the marker of a save beside its files; ``validation_loss``: None where none was measured at the step.

    ``last_sequence``: of the newest commit that this run knows of; a newer one is another run's, and refused. None: any may be there.
    """

    step: int
    config_text: str
    validation_loss: float | None = None
    last_sequence: int | None = None


@dataclass(frozen=True)
class Uploaded:
    """A committed checkpoint: its place, the seconds from the first file to the marker, and the number of the commit."""

    path: str
    n_bytes: int
    seconds: float
    sequence: int


def upload(
    storage: Storage, processes: Processes, tensors: dict[str, Tensor], *, what: Commit, own_process: bool, retention: Retention
) -> Uploaded:
    """Write, commit, prune. Collective; runs in the background. CheckpointError where the checkpoint was not committed."""
    start = time.monotonic()
    folder = processes.from_first(lambda: fresh_folder(storage, what.step))
    try:
        files = records_of(_write(tensors, storage.writer(folder), processes, own_process=own_process))
        sequence = processes.from_first(lambda: commit(storage, folder, what, files=files, world_size=processes.count))
    except (CheckpointException, CheckpointError, OSError, RuntimeError, ValueError) as error:
        if processes.rank == 0:
            _discard(storage, folder)
        raise save_failed(error, storage.path(folder)) from error
    seconds = time.monotonic() - start
    if processes.rank == 0:
        logger.info("saved %s in %.1f s", storage.path(folder), seconds)
        _prune(storage, retention)
    return Uploaded(storage.path(folder), sum(record.bytes for record in files.values()), seconds, sequence)


def fresh_folder(storage: Storage, step: int) -> str:
    """The name of a folder that does not exist; what killed runs left half-written is removed.

    The name of such a leftover is not used again: a writer that outlived its run may still be writing to it.
    """
    existing = storage.folders()
    attempt = 0
    while folder_name(step, attempt) in existing:
        attempt += 1
    for folder in existing:
        if not storage.is_committed(folder):
            logger.info("removing %s, which was never committed", storage.path(folder))
            _discard(storage, folder)
    return folder_name(step, attempt)


def commit(storage: Storage, folder: str, what: Commit, *, files: Mapping[str, FileRecord], world_size: int) -> int:
    """Write the marker; the number of the commit. Only process 0, and only after the upload of every process.

    CheckpointError where a file is not in the storage as it was written, or another run commits there too.
    """
    there = committed(storage)
    sequence = 1 + newest_sequence(there)
    if what.last_sequence is not None and sequence > what.last_sequence + 1:
        raise CheckpointError(
            f"{storage.path(there[-1][0])} was committed by another run since this one last looked, so this checkpoint was not committed: "
            "stop one of the two, and give each a checkpoint.folder of its own"
        )
    marker = Marker.make(
        what.step,
        sequence=sequence,
        world_size=world_size,
        config=what.config_text,
        files=files,
        validation_loss=what.validation_loss,
    )
    problem = marker.problem(storage.sizes(folder))
    if problem:
        raise CheckpointError(f"{storage.path(folder)}: {problem} after it was written; the checkpoint was not committed")
    try:
        storage.write_marker(folder, marker)
    except OSError as error:
        raise save_failed(error, storage.path(folder)) from error
    return sequence


def note_loss(storage: Storage, step: int, validation_loss: float, *, sequence: int) -> None:
    """Write a loss into the marker of commit number ``sequence`` where that is of ``step``. Only process 0."""
    for folder, marker in committed(storage):
        if (marker.sequence, marker.step) == (sequence, step) and marker.with_loss(validation_loss) != marker:
            storage.write_marker(folder, marker.with_loss(validation_loss))


def _write(tensors: dict[str, Tensor], writer: LocalWriter | UrlWriter, processes: Processes, *, own_process: bool) -> Metadata:
    """Every process writes its part; returns once all have."""
    if not own_process:
        return save(tensors, storage_writer=writer, process_group=processes.group, no_dist=not processes.distributed)
    response = async_save(
        tensors,
        storage_writer=writer,
        process_group=processes.group,
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        async_stager=_AlreadyStaged(),
    )
    saved = (response.upload_completion if isinstance(response, AsyncSaveResponse) else response).result()
    assert isinstance(saved, Metadata), "the process that saves hands back what save returns"
    return saved


class _AlreadyStaged(AsyncStager):
    """The copy has been made by ``Staging``."""

    def stage(self, state_dict: STATE_DICT_TYPE) -> STATE_DICT_TYPE:
        return state_dict

    def synchronize_staging(self) -> None:
        return

    def close(self) -> None:
        return


def committed(storage: Storage) -> list[tuple[str, Marker]]:
    """Committed checkpoints with a readable marker, oldest first."""
    found = []
    for folder in storage.folders():
        if storage.is_committed(folder):
            try:
                found.append((folder, storage.marker(folder)))
            except ValueError as error:  # left for the user to look at
                logger.warning("%s: %s", storage.path(folder), error)
    return sorted(found, key=lambda item: item[1].sequence)


def newest_sequence(found: Sequence[tuple[str, Marker]]) -> int:
    """The number of the last of the commits ``found``; 0 where there is none."""
    return max((marker.sequence for _, marker in found), default=0)


def _prune(storage: Storage, retention: Retention) -> None:
    """Remove the checkpoints that are not to be kept; a failure only warns, for the new one is safe."""
    try:
        for folder in superfluous(committed(storage), retention):
            storage.remove(folder)
    except OSError as error:
        logger.warning("an old checkpoint could not be removed: %s", error)


def _discard(storage: Storage, folder: str) -> None:
    """Remove what a failed save left, to give its room back."""
    try:
        storage.remove(folder)
    except OSError as error:
        logger.warning("%s could not be removed: %s", storage.path(folder), error)
