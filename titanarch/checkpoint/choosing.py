"""Which checkpoint to load: the one committed last that verifies."""

from dataclasses import dataclass

from titanarch.checkpoint.errors import CheckpointError
from titanarch.checkpoint.marker import MARKER, Marker
from titanarch.checkpoint.storage import Storage, step_of
from titanarch.config.errors import ConfigError, Problem


@dataclass(frozen=True)
class Choice:
    """A committed checkpoint that verifies, if there is one, and ``path: reason`` of each that was skipped."""

    found: tuple[str, Marker] | None
    skipped: tuple[str, ...]


def choose(storage: Storage, step: int = -1) -> Choice:
    """The checkpoint committed last whose files all verify; only those of ``step`` unless it is -1.

    Raises:
        CheckpointError: there are committed checkpoints, and every one is damaged.
        ConfigError: there is no sound checkpoint of ``step``.
    """
    committed: list[tuple[str, Marker]] = []
    skipped: list[str] = []
    any_damaged = False
    folders = storage.folders()
    for folder in (f for f in folders if step in (-1, step_of(f))):
        try:
            if storage.is_committed(folder):
                committed.append((folder, storage.marker(folder)))
            else:
                skipped.append(f"{storage.path(folder)}: it has no {MARKER}; the run stopped while it was written or removed")
        except (ValueError, OSError) as error:
            any_damaged = True
            skipped.append(f"{storage.path(folder)}: {error}")
    for folder, marker in sorted(committed, key=lambda item: item[1].sequence, reverse=True):
        problem = problem_of(storage, folder, marker)
        if not problem:
            return Choice((folder, marker), tuple(skipped))
        any_damaged = True
        skipped.append(f"{storage.path(folder)}: {problem}")
    reasons = "; ".join(skipped)
    if step != -1:
        there = ", ".join(folders) or "none"
        message = f"no sound checkpoint of step {step} in {storage.location}; there: {there}" + (f"; {reasons}" if reasons else "")
        raise ConfigError(Problem(message, key="checkpoint.load_step"))
    if any_damaged:
        raise CheckpointError(f"no checkpoint can be used: {reasons}. Restore one, or remove {storage.location} to start from step 0.")
    return Choice(None, tuple(skipped))


def problem_of(storage: Storage, folder: str, marker: Marker) -> str:
    """Why a committed checkpoint does not verify; empty when it does."""
    try:
        problem = marker.problem(storage.sizes(folder))
        if not problem:
            storage.index(folder)
    except (CheckpointError, OSError) as error:
        return str(error)
    return problem


def find(path: str) -> tuple[Storage, str, Marker]:
    """The checkpoint at ``path``: the folder of one checkpoint, or a folder of several, of which the one committed last.

    ConfigError where there is no sound one.
    """
    key = "checkpoint.initial_load_path"
    location, _, name = path.rstrip("/").rpartition("/")
    if "/" not in path.rstrip("/"):
        location = "."
    if step_of(name) is None:
        storage = Storage(path)
        choice = choose(storage)
        if choice.found is None:
            raise ConfigError(
                Problem(f"{path} holds no committed checkpoint; give the folder of one, or of several (step-00000100 ...)", key=key)
            )
        return storage, *choice.found
    storage = Storage(location or "/")
    try:
        marker = storage.marker(name)
    except (ValueError, OSError) as error:
        raise ConfigError(Problem(f"{path} is no committed checkpoint: {error}", key=key)) from error
    problem = problem_of(storage, name, marker)
    if problem:
        raise ConfigError(Problem(f"{path} is damaged: {problem}", key=key))
    return storage, name, marker
