"""Reading ahead in a thread."""

import threading
from collections import deque
from collections.abc import Iterator


class ReadAhead(Iterator[bytes]):
    """The blocks of ``blocks`` in their order, made ready by a thread that stays at most ``n_bytes`` and one block ahead.

    An error is raised at its place among them. ``close`` ends the thread; at the end of the blocks it ends by itself.
    """

    def __init__(self, blocks: Iterator[bytes], *, n_bytes: int) -> None:
        self._blocks, self._n_bytes = blocks, n_bytes
        self._ready: deque[bytes] = deque()
        self._ready_bytes = 0
        self._error: BaseException | None = None
        self._ended = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read_ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for block in self._blocks:
                with self._changed:
                    self._ready.append(block)
                    self._ready_bytes += len(block)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closed or self._ready_bytes < self._n_bytes)
                    if self._closed:
                        return
        except BaseException as error:  # noqa: BLE001 (whatever it is, the reader must see it)
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def __next__(self) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended)
            if not self._ready:
                if self._error is not None:
                    raise self._error
                raise StopIteration
            block = self._ready.popleft()
            self._ready_bytes -= len(block)
            self._changed.notify_all()
            return block

    def close(self) -> None:
        """End the thread, and wait until it has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
