"""Child processes that end when their parent does, however it ends, and not before."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from types import FrameType

SECONDS_AFTER_SIGNAL = 120
"""How long a data worker outlives a signal to end."""


def exit_with_parent(worker: int = 0) -> None:
    """Called in a child process: end it as soon as its parent has died. ``worker`` is what a pool calls this with.

    A parent that is killed tells its children nothing, and those of a fork server have another process as their
    parent in the eyes of the system, so they would wait for work for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a child process"
    threading.Thread(target=_exit_after, args=(parent.sentinel,), name="exit_with_parent", daemon=True).start()


def _exit_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def outlive_signals() -> None:
    """Called in a data worker: SIGTERM and SIGUSR1 end it two minutes later.

    Schedulers send these to all processes of a job at once, and the trainer wants more rows until its processes have agreed where to
    stop; a worker that died first would break the run before it could save.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _end_later)


def _end_later(_number: int, _frame: FrameType | None) -> None:
    signal.alarm(SECONDS_AFTER_SIGNAL)
