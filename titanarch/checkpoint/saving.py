"""Copying a state, writing it to a fresh folder, committing it, and removing old checkpoints."""

import hashlib
import logging
import time

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save, save
from torch.distributed.checkpoint.storage import StorageWriter

from titanarch.checkpoint.errors import CheckpointError, save_failed
from titanarch.checkpoint.loading import State, leaves_of, values_name
from titanarch.checkpoint.marker import Marker
from titanarch.checkpoint.processes import Processes
from titanarch.checkpoint.storage import Storage, folder_name
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


def stage(tensors: dict[str, Tensor], *, shared: bool) -> dict[str, Tensor]:
    """A copy on the CPU, finished on return; in memory that another process can map where ``shared``.

    The copy must not happen in the background: the next optimizer step writes in place and would tear it.
    """
    stager = DefaultStager(
        StagingOptions(use_pinned_memory=False, use_shared_memory=shared, use_async_staging=False, use_non_blocking_copy=False)
    )
    try:
        staged = stager.stage(tensors)
    except RuntimeError as error:
        if not shared:
            raise
        raise CheckpointError(
            f"no shared memory for a copy of the state ({error}); enlarge /dev/shm or use checkpoint.async_mode = 'async'"
        ) from error
    finally:
        stager.close()
    assert isinstance(staged, dict), "a stager that does not stage in the background returns the copy"
    return staged


def upload(
    storage: Storage,
    processes: Processes,
    tensors: dict[str, Tensor],
    *,
    step: int,
    config_text: str,
    own_process: bool,
    keep_latest_k: int,
) -> None:
    """Write, commit, prune. Collective; runs in the background. CheckpointError where the checkpoint was not committed."""
    start = time.monotonic()
    folder = processes.from_first(lambda: fresh_folder(storage, step))
    try:
        _write(tensors, storage.writer(folder), processes, own_process=own_process)
        processes.from_first(lambda: commit(storage, folder, step=step, world_size=processes.count, config_text=config_text))
    except (CheckpointException, CheckpointError, OSError, RuntimeError, ValueError) as error:
        if processes.rank == 0:
            _discard(storage, folder)
        raise save_failed(error, storage.path(folder)) from error
    if processes.rank == 0:
        logger.info("saved %s in %.1f s", storage.path(folder), time.monotonic() - start)
        _prune(storage, keep_latest_k)


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


def commit(storage: Storage, folder: str, *, step: int, world_size: int, config_text: str) -> None:
    """Write the marker. Only process 0, and only after the upload of every process."""
    sequence = 1 + max((marker.sequence for _, marker in _committed(storage)), default=0)
    files = storage.sizes(folder)
    try:
        storage.write_marker(folder, Marker.make(step, sequence=sequence, world_size=world_size, config=config_text, files=files))
    except OSError as error:
        raise save_failed(error, storage.path(folder)) from error


def _write(tensors: dict[str, Tensor], writer: StorageWriter, processes: Processes, *, own_process: bool) -> None:
    """Every process writes its part; returns once all have."""
    if not own_process:
        save(tensors, storage_writer=writer, process_group=processes.group)
        return
    response = async_save(
        tensors,
        storage_writer=writer,
        process_group=processes.group,
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        async_stager=_AlreadyStaged(),
    )
    (response.upload_completion if isinstance(response, AsyncSaveResponse) else response).result()


class _AlreadyStaged(AsyncStager):
    """The copy has been made by ``stage``."""

    def stage(self, state_dict: STATE_DICT_TYPE) -> STATE_DICT_TYPE:
        return state_dict

    def synchronize_staging(self) -> None:
        return

    def close(self) -> None:
        return


def _committed(storage: Storage) -> list[tuple[str, Marker]]:
    """Committed checkpoints with a readable marker, oldest first."""
    found = []
    for folder in storage.folders():
        if storage.is_committed(folder):
            try:
                found.append((folder, storage.marker(folder)))
            except ValueError as error:  # left for the user to look at
                logger.warning("%s: %s", storage.path(folder), error)
    return sorted(found, key=lambda item: item[1].sequence)


def _prune(storage: Storage, keep_latest_k: int) -> None:
    """Remove all but the newest ``keep_latest_k`` committed checkpoints; a failure only warns, for the new one is safe."""
    if keep_latest_k == 0:
        return
    try:
        for folder, _ in _committed(storage)[:-keep_latest_k]:
            storage.remove(folder)
    except OSError as error:
        logger.warning("an old checkpoint could not be removed: %s", error)


def _discard(storage: Storage, folder: str) -> None:
    """Remove what a failed save left, to give its room back."""
    try:
        storage.remove(folder)
    except OSError as error:
        logger.warning("%s could not be removed: %s", storage.path(folder), error)
