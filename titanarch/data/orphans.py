"""Child processes that end when their parent does, however it ends."""

import multiprocessing
import multiprocessing.connection
import os
import threading


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
