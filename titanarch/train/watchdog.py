"""A step, validation or save that hangs: every process leaves its stacks in the run's folder, and the run ends so that its launcher
starts it again.

::

    heartbeat.json                             the last step done, when, and by which process; about once a second
    hangs/step-00000007-rank0.txt              the Python stacks of process 0, which was in step 7, or in what came after it
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
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from titanarch.parallel.config import CommConfig
from titanarch.train.metrics.files import writing
from titanarch.train.watch import Watch

HEARTBEAT_FILE = "heartbeat.json"
FOLDER = "hangs"
HEARTBEAT_SECONDS = 1.0
LOOK_SECONDS = 1.0
MEDIAN_OF = 50
RECORDER = "_dump_nccl_trace_json"


@dataclass
class _Work:
    """One kind of work. ``name`` says what it is, with the step's number in it; ``seconds``: what it may take, by ``key``; 0: no limit.

    ``first_seconds``: the same before any was done. ``durations``: of the last ones.
    """

    name: str
    key: str
    seconds: float
    factor: float
    first_seconds: float = 0.0
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=MEDIAN_OF))

    @property
    def limit_seconds(self) -> float:
        if not self.seconds:
            return float("inf")
        usual = self.factor * statistics.median(self.durations) if self.durations else self.first_seconds
        return max(self.seconds, usual)


class StepWatchdog:
    """Looks from a thread at how long a step, a validation or a save of this process takes; entered for the life of the loop.

    The limits are comm.step_timeout_seconds, comm.validation_timeout_seconds and comm.save_timeout_seconds, or
    comm.step_timeout_factor times the median of the last ones of the kind if that is more; comm.init_timeout_seconds, if it is more,
    for the first step of a start, which compiles. What a step waits for inside ``validating``, ``saving`` and ``paused`` is not its own;
    what is ``paused`` has no limit. The thread of a process that is stopped sees the time when it goes on.
    """

    def __init__(self, config: CommConfig, watch: Watch, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """``folder``: of the run. ``clock``: seconds from any origin."""
        self._watch, self._folder, self._clock = watch, folder, clock
        factor, first = config.step_timeout_factor, float(config.init_timeout_seconds)
        self._steps = _Work("step {}", "comm.step_timeout_seconds", config.step_timeout_seconds, factor, first)
        self._validations = _Work(
            "the validation after step {}", "comm.validation_timeout_seconds", config.validation_timeout_seconds, factor
        )
        self._saves = _Work("the save after step {}", "comm.save_timeout_seconds", config.save_timeout_seconds, factor)
        self._running: tuple[_Work, float] | None = None
        """What is under way, and the clock at its begin; of a step, less what it took before a pause."""
        self._step = 0
        self._last_beat = -HEARTBEAT_SECONDS
        self._closed = threading.Event()
        self._dumped = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "StepWatchdog":
        self._watch.on_end = self.dump
        limits = [work.seconds for work in (self._steps, self._validations, self._saves) if work.seconds]
        if limits:
            every_seconds = min(LOOK_SECONDS, min(limits) / 4)
            self._thread = threading.Thread(target=self._look, args=(every_seconds,), name="step watchdog", daemon=True)
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
        """How long a step may take; inf where comm.step_timeout_seconds is 0."""
        return self._steps.limit_seconds

    def begin(self, step: int) -> None:
        """Step number ``step`` is under way."""
        self._step = step
        self._running = (self._steps, self._clock())

    def end(self) -> None:
        """The step is done. Process 0 says so in heartbeat.json."""
        assert self._running is not None, "begin comes first"
        (_, started), now = self._running, self._clock()
        self._running = None
        self._steps.durations.append(now - started)
        if self._watch.rank == 0 and now - self._last_beat >= HEARTBEAT_SECONDS:
            self._last_beat = now
            _write_heartbeat(self._folder / HEARTBEAT_FILE, self._step)

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

    def validating(self, step: int) -> AbstractContextManager[None]:
        """What happens inside is the validation after ``step``."""
        return self._doing(self._validations, step)

    def saving(self, step: int) -> AbstractContextManager[None]:
        """What happens inside is the save after ``step``, or the wait for its upload."""
        return self._doing(self._saves, step)

    @contextmanager
    def _doing(self, work: _Work, step: int) -> Iterator[None]:
        with self.paused():
            self._step, started = step, self._clock()
            self._running = (work, started)
            try:
                yield
                work.durations.append(self._clock() - started)
            finally:
                self._running = None

    def overdue(self) -> str | None:
        """What is wrong where what is under way is over its limit."""
        running = self._running
        if running is None:
            return None
        work, started = running
        limit = work.limit_seconds
        if self._clock() - started <= limit:
            return None
        return f"{work.name.format(self._step)} takes longer than {limit:g} s ({work.key}): it hangs"

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

    def _look(self, every_seconds: float) -> None:
        while not self._closed.wait(every_seconds):
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
