"""Which checkpoint to load: the one committed last that verifies."""

from dataclasses import dataclass, field

from titanarch.checkpoint.config import Verification
from titanarch.checkpoint.errors import CheckpointError
from titanarch.checkpoint.marker import MARKER, Marker, NewerFormatError
from titanarch.checkpoint.processes import Processes
from titanarch.checkpoint.storage import Storage, step_of
from titanarch.checkpoint.verifying import verify
from titanarch.config.errors import ConfigError, Problem


@dataclass(frozen=True)
class Choice:
    """A committed checkpoint that verifies, if there is one, and ``path: reason`` of each that was skipped."""

    found: tuple[str, Marker] | None
    skipped: tuple[str, ...]


@dataclass
class _Listed:
    """What a folder of checkpoints holds: committed ones, the newest first, and why others are none."""

    folders: list[str]
    committed: list[tuple[str, Marker]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    any_damaged: bool = False


def choose(storage: Storage, step: int = -1, *, before: int | None = None, how: Verification, processes: Processes) -> Choice:
    """The checkpoint committed last whose files all verify. Collective.

    Only those of ``step`` are looked at unless it is -1, and only those of steps below ``before`` unless it is None.

    Raises:
        CheckpointError: there are committed checkpoints, and every one is damaged; or a newer program wrote one.
        ConfigError: there is no sound checkpoint of ``step``.
    """
    listed = processes.from_first(lambda: _list(storage, step, before))
    skipped, any_damaged = listed.skipped, listed.any_damaged
    for folder, marker in listed.committed:
        problem = verify(storage, folder, marker, how=how, processes=processes)
        if not problem:
            return Choice((folder, marker), tuple(skipped))
        any_damaged = True
        skipped.append(f"{storage.path(folder)}: {problem}")
    reasons = "; ".join(skipped)
    if step != -1:
        there = ", ".join(listed.folders) or "none"
        message = f"no sound checkpoint of step {step} in {storage.location}; there: {there}" + (f"; {reasons}" if reasons else "")
        raise ConfigError(Problem(message, key="checkpoint.load_step"))
    if any_damaged:
        raise CheckpointError(f"no checkpoint can be used: {reasons}. Restore one, or remove {storage.location} to start from step 0.")
    return Choice(None, tuple(skipped))


def _list(storage: Storage, step: int, before: int | None) -> _Listed:
    """See ``choose``; the files are not looked at, but for the markers."""
    listed = _Listed(storage.folders())
    for folder in listed.folders:
        its_step = step_of(folder)
        assert its_step is not None, "the storage lists folders of checkpoints alone"
        if step not in (-1, its_step) or (before is not None and its_step >= before):
            continue
        try:
            if storage.is_committed(folder):
                listed.committed.append((folder, storage.marker(folder)))
            else:
                reason = f"it has no {MARKER}; the run stopped while it was written or removed"
                listed.skipped.append(f"{storage.path(folder)}: {reason}")
        except NewerFormatError as error:
            raise CheckpointError(f"{storage.path(folder)}: {error}") from error
        except (ValueError, OSError) as error:
            listed.any_damaged = True
            listed.skipped.append(f"{storage.path(folder)}: {error}")
    listed.committed.sort(key=lambda item: item[1].sequence, reverse=True)
    return listed


def find(path: str, *, key: str = "", how: Verification, processes: Processes) -> tuple[Storage, str, Marker]:
    """The checkpoint at ``path``: the folder of one checkpoint, or a folder of several, of which the one committed last. Collective.

    ConfigError where there is no sound one; ``key`` is what the path was given by.
    """
    location, name = split_path(path)
    storage = Storage(location)
    if not name:
        choice = choose(storage, how=how, processes=processes)
        if choice.found is None:
            raise ConfigError(
                Problem(f"{path} holds no committed checkpoint; give the folder of one, or of several (step-00000100 ...)", key=key)
            )
        return storage, *choice.found
    marker = processes.from_first(lambda: _marker(storage, name, path, key))
    problem = verify(storage, name, marker, how=how, processes=processes)
    if problem:
        raise ConfigError(Problem(f"{path} is damaged: {problem}", key=key))
    return storage, name, marker


def split_path(path: str) -> tuple[str, str]:
    """The folder of checkpoints, and the name of the one that ``path`` leads to; "" where it leads to the folder."""
    trimmed = path.rstrip("/") or "/"
    location, slash, name = trimmed.rpartition("/")
    if step_of(name) is None:
        return trimmed, ""
    return (location or "/") if slash else ".", name


def _marker(storage: Storage, folder: str, path: str, key: str) -> Marker:
    try:
        return storage.marker(folder)
    except (ValueError, OSError) as error:
        raise ConfigError(Problem(f"{path} is no committed checkpoint: {error}", key=key)) from error
