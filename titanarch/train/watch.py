"""Whether the processes of a run live, and which one broke it.

A collective tells its callers that it failed, not who failed it, and some networks leave the others waiting. So each
process has a thread that writes a beat (a number that grows, the last step finished) to the store through which the
processes met, and looks at the beat of the next process. What ends a run is written there once, by whoever knows it
first: a process that raised, of itself; the one before a process whose beat stands still. All others then name it and end.
"""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

BEAT_SECONDS = 2.0
SILENT_BEATS = 15
"""Beats of one's own during which the next process's does not change before it is taken for dead: 30 s."""
QUICK_BEATS = 3
"""The same once a collective has failed: 6 s."""
NAMING_SECONDS = 12.0
"""How long a process whose collective failed waits to learn why."""
GRACE_SECONDS = 10.0
"""How long a process may take to end by itself once the run is known to have broken."""
STORE_SECONDS = 10.0
STEP_FILE = "last_step"
"""Beside the launcher's file for errors: the last step that the process finished, for the case that it is killed."""

_COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out waiting|c10d", re.IGNORECASE)


class LostProcessError(RuntimeError):
    """A process broke the run, mostly another one; the message names it, its error and its last step."""


@dataclass(frozen=True)
class Beat:
    """``number`` grows; ``state`` is broken once a collective has failed, left when the process ends as it should."""

    number: int
    step: int | None
    host: str
    pid: int
    parent: int
    step_file: str
    state: Literal["running", "broken", "left"]

    def is_local(self, parent: int) -> bool:
        """Whether its process has the launcher ``parent``, of this process, on this node."""
        return (self.host, self.parent) == (socket.gethostname(), parent)


@dataclass(frozen=True)
class Cause:
    """Process ``rank`` broke the run: ``text`` says all there is to say."""

    rank: int
    text: str


def noted_step(step_file: Path) -> int | None:
    """The last step that a process of this node noted as finished; None where it noted none."""
    text = step_file.read_text().strip() if step_file.is_file() else ""
    return int(text) if text else None


def after_step(step: int | None) -> str:
    """Where in the run: ``step`` is the last one finished, None before the first."""
    return "before its first step was done" if step is None else f"after step {step}"


def _client(address: str, port: int) -> TCPStore:
    """A connection of the thread's own: one that waits for another process holds up everybody else on it."""
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_SECONDS), wait_for_workers=False)


def lives(pid: int) -> bool:
    """Whether there is a process ``pid`` on this node; one that nobody has waited for yet counts."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_of_collective(error: BaseException | None) -> bool:
    """Whether ``error`` is, or comes of, a collective that failed."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _COLLECTIVE.search(str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False


class Watch:
    """The beats of process ``rank`` of ``world_size``. One process needs none; its last step is noted all the same."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self._step: int | None = None
        self._step_file: int | None = None
        self._step_path = ""
        self._state: Literal["running", "broken", "left"] = "running"
        self._own_failure: Cause | None = None
        self._cause: Cause | None = None
        self._known, self._told, self._wake = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.on_end: Callable[[], None] | None = None
        """Called from a thread where the end of the run is known, and this process is not at fault."""
        self._hangs = False
        self._is_told_to_end = False
        self._number = 0
        self._broken_at: int | None = None
        self._parent = os.getppid()
        self._seen: dict[int, tuple[Beat, int]] = {}
        """The beat of another process and the number of the own beat at which it last changed."""

    def start(self, meeting_place: tuple[str, int] | None = None, name: str = "") -> None:
        """Begin to beat at the store at ``meeting_place``, None for one process.

        ``name`` is of this start of the run, alike on all processes.
        """
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if error_file:
            self._step_path = str(Path(error_file).with_name(STEP_FILE))
            self._step_file = os.open(self._step_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if meeting_place is not None or "TORCHELASTIC_RUN_ID" in os.environ:
            self._thread = threading.Thread(target=self._run, args=(meeting_place, f"titanarch/{name}"), name="watch", daemon=True)
            self._thread.start()

    def finished(self, step: int) -> None:
        """Step number ``step`` is done."""
        self._step = step
        if self._step_file is not None:
            os.pwrite(self._step_file, f"{step:<20}".encode(), 0)

    def close(self) -> None:
        """This process ends as it should; the others do not miss it. A second call does nothing."""
        if self._thread is not None:
            self._state = "left"
            self._wake.set()
            self._thread.join(STORE_SECONDS)
            self._thread = None
        if self._step_file is not None:
            os.close(self._step_file)
            self._step_file = None

    def told_to_end(self) -> None:
        """This process was told to, by a signal. So does a launcher when one of its processes has died: then there is no step to finish,
        and the main thread, which may wait for the dead one, is not waited for."""
        self._is_told_to_end = True
        self._wake.set()

    def break_off(self, why: str) -> None:
        """End the run, since the main thread of this process waits in vain: all processes are told, and those of this node that
        are stopped go on, so that they hear of it. Does not return."""
        text = f"process {self.rank} of {self.world_size} (on {socket.gethostname()}, pid {os.getpid()}) says that {why}"
        if self.world_size > 1:
            self._own_failure, self._hangs = Cause(self.rank, text), True
            self._wake.set()
            self._known.wait(STORE_SECONDS)
            time.sleep(GRACE_SECONDS)
        self._end(text if self._cause is None else self._cause.text)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What is raised inside is told to the other processes; a collective that failed is raised as LostProcessError.

        Where nobody is found to be at fault, the collective's own error is raised.
        """
        try:
            yield
        except Exception as error:
            lost = self._lost(error)
            if lost is None:
                raise
            raise lost from error

    def _lost(self, error: Exception) -> LostProcessError | None:
        if self._thread is None or self.world_size == 1 or isinstance(error, LostProcessError):
            return None
        if _is_of_collective(error):
            self._state = "broken"
            self._wake.set()
            self._known.wait(NAMING_SECONDS)
            return None if self._cause is None else LostProcessError(self._cause.text)
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        who = f"process {self.rank} of {self.world_size} (on {socket.gethostname()})"
        self._own_failure = Cause(self.rank, f"{who} failed: {first_line}, {after_step(self._step)}")
        self._wake.set()
        self._told.wait(STORE_SECONDS)
        return None

    def _run(self, meeting_place: tuple[str, int] | None, prefix: str) -> None:
        """The thread's life: a beat every BEAT_SECONDS, or at once when woken, until the process ends."""
        store: Store | None = None
        failing_since: float | None = None
        deadline: float | None = None
        while True:
            leaving = self._state == "left"
            if os.getppid() != self._parent and "TORCHELASTIC_RUN_ID" in os.environ:
                self._end("the launcher of this process has died")
            try:
                if meeting_place is not None:
                    store = store or _client(*meeting_place)
                    self._beat(store, prefix)
                failing_since = None
            except dist.DistError as error:
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > 2 * STORE_SECONDS:
                    self._end(f"the store at {meeting_place} is gone, and so is the launcher or process that held it: {error}")
            if leaving:
                return
            if self._known.is_set():
                deadline = deadline or time.monotonic() + (0 if self._is_told_to_end else GRACE_SECONDS)
                if time.monotonic() >= deadline and self._cause is not None:
                    self._end(self._cause.text)
            self._wake.wait(BEAT_SECONDS)
            self._wake.clear()

    def _beat(self, store: Store, prefix: str) -> None:
        """Write the own beat and what is known of the run's end, read what the others know."""
        self._number += 1
        own = Beat(self._number, self._step, socket.gethostname(), os.getpid(), self._parent, self._step_path, self._state)
        store.set(f"{prefix}/{self.rank}", json.dumps(asdict(own)))
        if self._own_failure is not None:
            if self._hangs:
                self._awaken([Beat(**json.loads(store.get(key))) for key in self._keys(prefix) if store.check([key])])
                self._hangs = False
            self._publish(store, prefix, self._own_failure)
            self._told.set()
        elif store.check([f"{prefix}/cause"]):
            self._learn(store.get(f"{prefix}/cause"))
        elif self._state != "left":
            if self._is_told_to_end:
                self._end_with_siblings(store, prefix)
            broken = self._state == "broken"
            self._broken_at = self._number if broken and self._broken_at is None else self._broken_at
            others = (rank for rank in range(self.world_size) if rank != self.rank)
            silent = self._silent(store, prefix, list(others) if broken else [(self.rank + 1) % self.world_size], broken)
            if silent is not None:
                self._publish(store, prefix, silent)

    def _keys(self, prefix: str) -> list[str]:
        """Of the beats of the other processes."""
        return [f"{prefix}/{rank}" for rank in range(self.world_size) if rank != self.rank]

    def _publish(self, store: Store, prefix: str, cause: Cause) -> None:
        """Write ``cause``, unless there is one already."""
        self._learn(store.compare_set(f"{prefix}/cause", "", json.dumps(asdict(cause))))

    def _learn(self, text: bytes) -> None:
        self._cause = Cause(**json.loads(text))
        if not self._known.is_set():
            if self.on_end is not None and self._own_failure is None:
                self.on_end()
            self._known.set()

    def _silent(self, store: Store, prefix: str, ranks: list[int], broken: bool) -> Cause | None:
        """The processes of ``ranks`` whose beats stand still; when ``broken`` and all beat, those that wait for nobody."""
        limit, silent, running = QUICK_BEATS if broken else SILENT_BEATS, [], []
        for rank in ranks:
            key = f"{prefix}/{rank}"
            if not store.check([key]):
                continue  # not up yet, which the time-out of the first collectives deals with
            beat = Beat(**json.loads(store.get(key)))
            if rank not in self._seen or self._seen[rank][0].number != beat.number:
                self._seen[rank] = (beat, self._number)
            if beat.state == "left":
                continue
            if self._number - self._seen[rank][1] >= limit:
                silent.append((rank, beat))
            elif beat.state == "running":
                running.append((rank, beat))
        if silent:
            self._awaken([beat for _, beat in silent])
            return self._accused(silent, "stopped answering: it was killed or hangs")
        if self._broken_at is not None and running and self._number - self._broken_at > QUICK_BEATS:
            return self._accused(running, "did not come to a collective that others waited in")
        return None

    def _end_with_siblings(self, store: Store, prefix: str) -> None:
        """End where a process of this node's launcher is dead that had not left."""
        for rank in (rank for rank in range(self.world_size) if rank != self.rank and store.check([f"{prefix}/{rank}"])):
            beat = Beat(**json.loads(store.get(f"{prefix}/{rank}")))
            if beat.is_local(self._parent) and beat.state != "left" and not lives(beat.pid):
                self._end(self._accused([(rank, beat)], "is dead").text)

    def _accused(self, found: list[tuple[int, Beat]], what: str) -> Cause:
        each = [
            f"process {rank} of {self.world_size} (on {beat.host}, pid {beat.pid}) {what}, {self._after_step_of(beat)}"
            for rank, beat in found
        ]
        more = f"; and {len(each) - 4} more" if len(each) > 4 else ""
        return Cause(found[0][0], "; ".join(each[:4]) + more)

    def _after_step_of(self, beat: Beat) -> str:
        """The step that its process noted where this one can read it; a beat tells of some time before its last."""
        noted = noted_step(Path(beat.step_file)) if beat.step_file and beat.is_local(self._parent) else None
        return after_step(noted) if noted is not None else f"{after_step(beat.step)}, or a later one"

    def _awaken(self, beats: list[Beat]) -> None:
        """A process of this node that was stopped cannot be ended by the launcher before it goes on."""
        for beat in beats:
            if beat.is_local(self._parent):
                try:
                    os.kill(beat.pid, signal.SIGCONT)
                except (ProcessLookupError, PermissionError):
                    continue

    def _end(self, why: str) -> None:
        """End this process from the thread: the main one may wait in a collective that never ends."""
        print(f"titanarch: process {self.rank} of {self.world_size} ends {after_step(self._step)}: {why}", file=sys.stderr, flush=True)
        get_error_handler().record_exception(LostProcessError(why))
        os._exit(1)
