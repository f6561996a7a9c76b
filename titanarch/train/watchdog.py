"""A step that hangs: every process leaves its stacks in the run's folder, and the run ends so that its launcher starts it again.

::

    heartbeat.json                             the last step done, when, and by which process; about once a second
    hangs/step-00000007-rank0.txt              the Python stacks of process 0, which was in step 7
    hangs/step-00000007-rank0-collectives.json on CUDA: what its collectives did last (torch's flight recorder)
"""

import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from titanarch.parallel.config import CommConfig
from titanarch.train.metrics.files import writing
from titanarch.train.watch import Watch

HEARTBEAT_FILE = "heartbeat.json"
FOLDER = "hangs"
HEARTBEAT_SECONDS = 1.0
LOOK_SECONDS = 1.0
MEDIAN_STEPS = 50
RECORDER = "_dump_nccl_trace_json"


class StepWatchdog:
    """Looks from a thread at how long a step of this process takes; entered for the life of the loop.

    The limit is comm.step_timeout_seconds, or comm.step_timeout_factor times the median of the last steps if that is more;
    comm.init_timeout_seconds, if it is more, for the first step of a start, which compiles. What is inside ``paused``
    (validation, saving) has no limit. The thread of a process that is stopped sees the time when it goes on.
    """

    def __init__(self, config: CommConfig, watch: Watch, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """``folder``: of the run. ``clock``: seconds from any origin."""
        self._config, self._watch, self._folder, self._clock = config, watch, folder, clock
        self._durations: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._running: tuple[int, float] | None = None
        """The step under way, and the clock at its begin less what it took before a pause."""
        self._step = 0
        self._last_beat = -HEARTBEAT_SECONDS
        self._closed = threading.Event()
        self._dumped = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "StepWatchdog":
        self._watch.on_end = self.dump
        if self._config.step_timeout_seconds:
            self._thread = threading.Thread(target=self._look, name="step watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._watch.on_end = None
        self._running = None
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def limit_seconds(self) -> float:
        """How long the step under way may take; inf where comm.step_timeout_seconds is 0."""
        least = float(self._config.step_timeout_seconds)
        if not least:
            return float("inf")
        if not self._durations:
            return max(least, float(self._config.init_timeout_seconds))
        return max(least, self._config.step_timeout_factor * statistics.median(self._durations))

    def begin(self, step: int) -> None:
        """Step number ``step`` is under way."""
        self._step = step
        self._running = (step, self._clock())

    def end(self) -> None:
        """The step is done. Process 0 says so in heartbeat.json."""
        assert self._running is not None, "begin comes first"
        (step, started), now = self._running, self._clock()
        self._running = None
        self._durations.append(now - started)
        if self._watch.rank == 0 and now - self._last_beat >= HEARTBEAT_SECONDS:
            self._last_beat = now
            _write_heartbeat(self._folder / HEARTBEAT_FILE, step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the step's time."""
        running, now = self._running, self._clock()
        self._running = None
        try:
            yield
        finally:
            if running is not None:
                self._running = (running[0], running[1] + self._clock() - now)

    def overdue(self) -> str | None:
        """What is wrong where the step under way is over its limit."""
        running = self._running
        if running is None:
            return None
        taken, limit = self._clock() - running[1], self.limit_seconds
        if taken <= limit:
            return None
        return f"step {running[0]} takes longer than {limit:g} s (comm.step_timeout_seconds): it hangs"

    def dump(self) -> None:
        """Write the stacks of this process, and on CUDA its last collectives; once, whoever asks for it."""
        if not self._dumped.acquire(blocking=False):
            return
        rank, folder = self._watch.rank, self._folder / FOLDER
        name = f"step-{self._step:08d}-rank{rank}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"{name}.txt", "a") as file:
                file.write(f"process {rank} on {socket.gethostname()}, pid {os.getpid()}, in step {self._step}, at {time.time():.0f}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            if torch.cuda.is_available():
                (folder / f"{name}-collectives.json").write_bytes(_collectives())
        except (OSError, RuntimeError, AttributeError) as error:  # torch's recorder is private; the run must end whatever it does
            print(f"titanarch: process {rank} could not write all of {folder / name}: {error}", file=sys.stderr, flush=True)

    def _look(self) -> None:
        while not self._closed.wait(min(LOOK_SECONDS, self._config.step_timeout_seconds / 4)):
            why = self.overdue()
            if why is not None:
                self.dump()
                self._watch.break_off(f"{why}; the stacks of the processes are in {self._folder / FOLDER}")


def _collectives() -> bytes:
    """torch's flight recorder of NCCL, as JSON."""
    dump = getattr(torch._C._distributed_c10d, RECORDER)  # a build of torch without NCCL has none
    recorded: bytes | str = dump(includeCollectives=True, onlyActive=False)
    return recorded.encode() if isinstance(recorded, str) else recorded


def _write_heartbeat(path: Path, step: int) -> None:
    """Replace the file in one step; a power cut may lose it, since waiting for the disk would hold up the run."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        temporary.write_text(json.dumps({"step": step, "time": time.time(), "pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        os.replace(temporary, path)
