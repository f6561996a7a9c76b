"""A run that is told to end by a signal: all processes stop after the same step, save, and end with a status that says so.

Told is who gets SIGTERM (a preemption, ``kill``, the launcher) or SIGUSR1 (Slurm before its time limit). Status 128 and the
signal's number is what a shell gives a process that the signal killed: launchers take it for an interruption, not for a fault.
"""

import math
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from titanarch.train.watch import Watch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SECONDS_BETWEEN_AGREEMENTS = 0.5
"""How long processes go on before they ask each other again whether one of them was told."""
MOST_STEPS_BETWEEN_AGREEMENTS = 1000


def status_of(number: int) -> int:
    """The exit status of a process that signal ``number`` ended."""
    return 128 + number


class ToldToEnd(BaseException):
    """The run was told to end, and has saved what it did. No error, so that nothing which handles errors takes it for one."""

    def __init__(self, number: int, step: int, *, saves: bool, speaks: bool) -> None:
        """Signal ``number`` came; ``step``: the last one done. ``saves``: it is in a checkpoint. ``speaks``: this process says so."""
        goes_on = f"goes on from step {step}" if saves else "begins anew, since checkpoint.enable is false"
        message = f"told to end by {signal.Signals(number).name} after step {step}: the same command {goes_on}"
        super().__init__(message if speaks else "")
        self.status = status_of(number)


class Stopping:
    """Listens for SIGNALS while it is entered, which only the main thread can; before and after, they do what they did.

    A process that is told goes on until all know of it: ``agreed``, called by all after each step, tells all at the same call.
    Every half a second of steps they ask each other by a reduction of three numbers on the host, so no step waits for a device; where
    a number is wanted of all at each step, ``least`` asks both at once. One process asks nobody. Where the main thread waits for a
    process of this node that has died, ``watch`` ends it.
    """

    def __init__(self, watch: Watch, *, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock``: seconds from any origin."""
        self._watch, self._clock = watch, clock
        self.told = 0
        """The number of the signal that came first to this process; 0: none did."""
        self.signal = 0
        """The number of the signal for which all processes end; 0 until they agree."""
        self._until_asked = 0
        self._asked: tuple[int, float] = (0, clock())
        """Calls of ``agreed`` since the processes asked each other last, and the clock then."""
        self._before: dict[signal.Signals, Any] = {}
        self._ends: tuple[socket.socket, ...] = ()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
            if self._watch.world_size > 1:
                self._ends = socket.socketpair()
                self._ends[1].setblocking(False)
                signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
                self._thread = threading.Thread(target=self._listen, args=(self._ends[0],), name="signals", daemon=True)
                self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is not None:
            signal.set_wakeup_fd(-1)
            self._ends[1].close()
            self._thread.join()
            self._ends[0].close()
            self._thread = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agreed(self) -> bool:
        """Whether all processes end now. Collective, after each step."""
        calls, then = self._asked
        self._asked = calls + 1, then
        return bool(self.signal) if calls + 1 < self._until_asked else self.ask()

    def ask(self) -> bool:
        """The same, asking at once. Collective."""
        self.least(math.inf)
        return bool(self.signal)

    def least(self, number: float) -> float:
        """The least of the processes' ``number``s, which hear of signals on the way as by ``ask``. Collective."""
        if self._watch.world_size == 1:
            self.signal = self.signal or self.told
            return number
        (calls, then), now = self._asked, self._clock()
        heard = torch.tensor([float(self.told), (now - then) / max(calls, 1), -number], dtype=torch.float64)
        dist.all_reduce(heard, op=dist.ReduceOp.MAX)
        self.signal = self.signal or int(heard[0])
        pace = max(float(heard[1]), SECONDS_BETWEEN_AGREEMENTS / MOST_STEPS_BETWEEN_AGREEMENTS)
        self._until_asked, self._asked = max(int(SECONDS_BETWEEN_AGREEMENTS / pace), 1), (0, now)
        return -float(heard[2])

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        """More signals change nothing: schedulers and launchers both send one, and then SIGKILL when their patience is over."""
        self.told = self.told or number

    def _listen(self, end: socket.socket) -> None:
        """Handlers run between two lines of the main thread, and so never where that waits; the numbers of signals come here at once."""
        while numbers := end.recv(64):
            if any(number in numbers for number in SIGNALS):
                self._watch.told_to_end()
