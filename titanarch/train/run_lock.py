"""Who may write in a run folder: one start at a time, on all machines that see it."""

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from weakref import WeakSet

from titanarch.config.errors import ConfigError
from titanarch.train.metrics.files import writing
from titanarch.train.watch import lives

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held_locks: "WeakSet[RunLock]" = WeakSet()


@dataclass(frozen=True)
class Owner:
    """The process that has a folder, or had it: its host, number there, and start (UTC, ISO 8601)."""

    host: str
    process: int
    started: str

    @classmethod
    def this(cls) -> "Owner":
        return cls(socket.gethostname(), os.getpid(), datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Owner | None":
        """Of a lock's file; None where it names nobody, as after an orderly end."""
        try:
            table = json.loads(data)
            return cls(str(table["host"]), int(table["process"]), str(table["started"]))
        except (ValueError, TypeError, KeyError):
            return None

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, started at {self.started}"


class RunLock:
    """The right to write in a run folder, for the life of this process (``flock``: a kill gives it back).

    On one host the kernel gives the lock back when its owner dies. Over NFS the server does, once the dead client's lease is over, and
    where a file system keeps locks to each host (Lustre with localflock, NFS with local_lock) two hosts do not see each other: so an
    owner of another host that did not give its lock back is told about in a warning. Where a file system has no locks at all, the
    owner named in the file is what counts: one that lives here, or of another host, is believed.
    """

    def __init__(self, path: Path) -> None:
        """Take the lock. Raises ConfigError naming the owner when another live process has it."""
        self._path = path
        with writing(path):
            self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        before = Owner.from_bytes(os.pread(self._descriptor, 1000, 0))
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._close()
            raise ConfigError(_in_use(path.parent, before)) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self._close()
                raise
            self._without_locks(before)
        else:
            if before is not None and not before.is_here:
                warnings.warn(f"{path.parent}: {_taken_over(path, before)}", stacklevel=2)
        with writing(path):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(asdict(Owner.this())).encode() + b"\n", 0)
        _close_locks_in_children()
        _held_locks.add(self)

    def release(self) -> None:
        """Give the lock back; a second call does nothing. The file stays: removing it would race with the next owner."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
        self._close()

    def _without_locks(self, owner: Owner | None) -> None:
        """Go by the file alone. Raises ConfigError where its owner lives, or may."""
        if owner is not None and not (owner.is_here and not lives(owner.process)):
            self._close()
            raise ConfigError(
                f"{self._path.parent} is in use by {owner}, as far as can be told: this file system has no locks, so the death of a "
                f"run is not noticed. Stop that run, or make sure that it is dead; then remove {self._path} and start again"
            )
        warnings.warn(
            f"{self._path.parent}: this file system has no locks; {self._path.name} names this process, which keeps later runs out, "
            "but not one that starts at the same moment",
            stacklevel=3,
        )

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _in_use(folder: Path, owner: Owner | None) -> str:
    advice = "wait for it or stop it, or choose another job.dump_folder"
    if owner is None or owner.is_here:
        return f"{folder} is in use by {owner or 'another process'}; {advice}"
    return (
        f"{folder} is in use by {owner}; {advice}. Where that host is down, its lock ends with its lease at the file server "
        "(with NFS a minute or two): start again then"
    )


def _taken_over(path: Path, owner: Owner) -> str:
    """What to know of an owner elsewhere that ended without giving its lock back."""
    beat = path.with_name("heartbeat.json")
    last = f"; its last step was {time.time() - beat.stat().st_mtime:.0f} s ago" if beat.exists() else ""
    return (
        f"taken over from {owner}, which did not give it back{last}. Where that run is alive, because this file system keeps locks to "
        "each host, stop one of the two"
    )


def _close_in_child() -> None:
    for lock in list(_held_locks):
        lock._close()
    _held_locks.clear()


@cache
def _close_locks_in_children() -> None:
    """A forked data worker has a copy of the descriptor, and would keep the lock after its parent was killed."""
    os.register_at_fork(after_in_child=_close_in_child)
