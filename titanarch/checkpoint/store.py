"""The checkpoints of a run: saved in the background, committed last, loaded only when they verify."""

import logging
import posixpath
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titanarch.checkpoint.choosing import choose, find
from titanarch.checkpoint.config import CheckpointConfig, Verification
from titanarch.checkpoint.errors import CheckpointError
from titanarch.checkpoint.loading import State, read, read_initial
from titanarch.checkpoint.processes import Processes
from titanarch.checkpoint.retention import Retention
from titanarch.checkpoint.saving import Commit, Staging, Uploaded, collect, committed, newest_sequence, note_loss, upload
from titanarch.checkpoint.storage import Storage
from titanarch.config.errors import ConfigError, Problem

logger = logging.getLogger(__name__)

MODEL = "model"


@dataclass(frozen=True)
class LoadedStep:
    """What was loaded: its step, place, number of processes and configuration; ``path: reason`` of what was skipped."""

    step: int
    path: str
    world_size: int
    config: str
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Saved:
    """A save that is committed.

    ``stall_seconds``: how long ``save`` held training up: the wait for the upload before it, the copy, and the upload
    where it is not in the background. ``upload_seconds``: from the first file to the marker.
    """

    step: int
    path: str
    n_bytes: int
    stall_seconds: float
    upload_seconds: float

    @property
    def seconds(self) -> dict[str, float]:
        """As metrics name them."""
        return {"checkpoint_stall_seconds": self.stall_seconds, "checkpoint_upload_seconds": self.upload_seconds}

    def __str__(self) -> str:
        return (
            f"saved {self.path}: {self.n_bytes / 1e6:,.1f} MB; training waited {self.stall_seconds:.2f} s, "
            f"the upload took {self.upload_seconds:.2f} s"
        )


@dataclass(frozen=True)
class _Pending:
    """A save that may still be running."""

    step: int
    upload: "Future[Uploaded]"
    stall_seconds: float


class Checkpointer:
    """Saves and loads the checkpoints of one run.

    ``torch.distributed`` must be initialized, also for one process. Every method but ``due``, ``maybe_wait`` and ``take_saved`` is
    collective: all processes call it, in the same order. The checkpoints lie on storage that all processes see.

    A state is a dict of named objects with ``state_dict`` and ``load_state_dict`` (or plain dicts): nested dicts of
    tensors and plain values. DTensors are saved by shards and load on any number of processes. Everything else must
    be the same on all processes: ``merge`` makes per-process state so.

    Attributes:
        config: the section.
        processes: the group of the training thread, as ``RandomState`` takes it.
    """

    def __init__(self, config: CheckpointConfig, run_folder: str | Path, *, timeout: timedelta = timedelta(hours=1)) -> None:
        """``timeout``: how long the fastest process waits for the upload of the slowest."""
        assert dist.is_initialized(), "a Checkpointer needs torch.distributed, also on one process"
        self.config = config
        self._storage = Storage(_location(run_folder, config.folder))
        self.processes = Processes(timeout)
        self._upload_processes = Processes(timeout)  # used by the thread alone
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._staging = Staging(shared=config.async_mode == "process")
        self._pending: _Pending | None = None
        self._saved: list[Saved] = []
        self._last_sequence: int | None = None

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after this step."""
        return self.config.enable and step > 0 and step % self.config.interval == 0

    def claim(self) -> None:
        """Before the first step: that checkpoints can be written, and who commits there. Collective.

        From then on a commit of another run in the same place fails the next save. Raises ConfigError where a process cannot write
        there, with the reason; does nothing where checkpoints are not enabled.
        """
        if not self.config.enable:
            return
        found = self.processes.gather(self._storage.why_not_writable(str(self.processes.rank)))
        reasons = [f"process {rank}: {reason}" for rank, reason in enumerate(found) if reason]
        if reasons:
            message = f"{self._storage.location} cannot be written ({reasons[0]}), so nothing was trained"
            remedy = "give credentials or permission to write there, make room, or choose another folder"
            raise ConfigError(Problem(f"{message}; {remedy}", key="checkpoint.folder"))
        self._last_sequence = self.processes.from_first(lambda: newest_sequence(committed(self._storage)))

    def merge(self, local: Mapping[str, Any]) -> dict[str, Any]:
        """The union of the processes' dicts of plain values, each key with one owner; see ``Processes.merge``."""
        return self.processes.merge(local)

    def save(self, step: int, state: State, *, config_text: str, validation_loss: float | None = None, force_sync: bool = False) -> None:
        """Save ``state`` as of now. On return it is copied, so training may go on; the upload may still be running.

        Waits for the upload before this one. Does nothing where checkpoints are not enabled.

        Args:
            step: training steps done.
            state: the objects of the run.
            config_text: the resolved configuration, kept in the commit marker.
            validation_loss: measured at this step, by which the best are kept; None where none was.
            force_sync: return only once the checkpoint is committed.

        Raises:
            CheckpointError: this save, or the one before, failed; committed checkpoints are intact.
        """
        if not self.config.enable:
            return
        start = time.monotonic()
        self.wait()
        # What is waited for needs no other process, which a signal to all may have ended.
        mode = "disabled" if force_sync else self.config.async_mode
        tensors = collect(state, self.processes)
        if mode != "disabled":
            tensors = self._staging.copy(tensors)
        running = self._thread.submit(
            upload,
            self._storage,
            self._upload_processes,
            tensors,
            what=Commit(step, config_text, validation_loss, self._last_sequence),
            own_process=mode == "process",
            retention=Retention.of(self.config),
        )
        is_awaited = force_sync or mode == "disabled"
        if is_awaited:
            running.exception()  # waits; what it is, wait() raises
        self._pending = _Pending(step, running, time.monotonic() - start)
        if is_awaited:
            self.wait()

    def note_loss(self, step: int, validation_loss: float) -> None:
        """Add to the last save, of ``step``, the loss that was measured at it since. Collective; waits for the upload.

        Does nothing where checkpoints are not enabled. Raises CheckpointError where the save failed, or the marker cannot be written.
        """
        if not self.config.enable:
            return
        self.wait()
        sequence = self._last_sequence
        assert sequence is not None, "claim or save comes first"
        self.processes.from_first(lambda: note_loss(self._storage, step, validation_loss, sequence=sequence))

    def maybe_wait(self) -> None:
        """To be called before each optimizer step: returns at once, or raises what made an upload fail.

        There is no copy to wait for: ``save`` returns only when its copy is finished.
        """
        if self._pending is not None and self._pending.upload.done():
            self.wait()

    def wait(self) -> None:
        """Until the last save is committed; raises CheckpointError where it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            done = pending.upload.result()
            self._last_sequence = done.sequence
            self._saved.append(Saved(pending.step, done.path, done.n_bytes, pending.stall_seconds, done.seconds))

    def wait_for_all(self) -> str:
        """Until the last save is committed, or has failed on a process: what failed, "" where nothing did. The same on all processes."""
        try:
            self.wait()
            failure = ""
        except CheckpointError as error:
            failure = str(error)
        return next((found for found in self.processes.gather(failure) if found), "")

    def take_saved(self) -> list[Saved]:
        """The saves that were found committed since the last call, in order. Not collective."""
        saved, self._saved = self._saved, []
        return saved

    def load(self, state: State) -> LoadedStep | None:
        """Resume from the checkpoint committed last that verifies, or from that of ``checkpoint.load_step``.

        What was skipped, and why, is logged as a warning. None where there is nothing to resume, or where
        checkpoints are not enabled.

        Raises:
            CheckpointError: every committed checkpoint is damaged, or the chosen one does not fit ``state``.
            ConfigError: there is no sound checkpoint of ``checkpoint.load_step``.
        """
        if not self.config.enable:
            return None
        self.wait()
        return load(self._storage.location, state, step=self.config.load_step, how=self.config.verify, processes=self.processes)

    def load_initial(self, state: State) -> LoadedStep | None:
        """Start from ``checkpoint.initial_load_path``: the "model" of ``state`` or all of it, but for what is excluded.

        None where no path is set. The step is where the other run was; with the model alone this run starts at 0.

        Raises:
            ConfigError: the path holds no committed checkpoint, or its names or shapes do not fit.
        """
        path = self.config.initial_load_path
        if not path:
            return None
        storage, folder, marker = find(path, key="checkpoint.initial_load_path", how=self.config.verify, processes=self.processes)
        wanted = {MODEL: state[MODEL]} if self.config.initial_load_model_only else state
        read_initial(storage, folder, wanted, exclude=self.config.exclude_from_loading, processes=self.processes)
        return LoadedStep(marker.step, storage.path(folder), marker.world_size, marker.config, ())

    def close(self) -> None:
        """Finish the pending save, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._staging.close()


def load(
    location: str | Path,
    state: State,
    *,
    step: int = -1,
    before: int | None = None,
    how: Verification = "checksums",
    processes: Processes | None = None,
) -> LoadedStep | None:
    """Load ``state`` from the checkpoint below ``location`` committed last that verifies, or from that of ``step``, or below ``before``.

    For what reads a run and saves nothing, such as evaluation: works without ``torch.distributed`` on one process,
    and is collective with it. ``how``: what is compared before it is loaded. None, and errors: as ``Checkpointer.load``.
    """
    processes = processes or Processes(timedelta(hours=1))
    storage = Storage(location)
    choice = choose(storage, step, before=before, how=how, processes=processes)
    if processes.rank == 0:
        for reason in choice.skipped:
            logger.warning("skipped the checkpoint %s", reason)
    if choice.found is None:
        return None
    folder, marker = choice.found
    read(storage, folder, state, processes=processes)
    return LoadedStep(marker.step, storage.path(folder), marker.world_size, marker.config, choice.skipped)


def _location(run_folder: str | Path, folder: str) -> str:
    """The checkpoints' place: an absolute path or URL as it is, else inside the run's folder."""
    return folder if "://" in folder else posixpath.join(str(run_folder), folder)
