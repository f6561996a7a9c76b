"""Whom the watch names: beats are made one by one, on a store in memory, so nothing waits."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from titanarch.train.watch import QUICK_BEATS, SILENT_BEATS, STEP_FILE, Beat, Cause, LostProcessError, Watch, after_step

OTHER = Beat(number=1, step=7, host="far", pid=11, parent=10, step_file="", state="running")


def write(store: HashStore, rank: int, beat: Beat) -> None:
    store.set(f"run/{rank}", json.dumps(asdict(beat)))


def beaten(watch: Watch, store: HashStore, n: int, moving: dict[int, Beat] | None = None) -> Cause | None:
    """What ``watch`` knows after ``n`` beats, while those of the processes in ``moving`` go on."""
    for number in range(n):
        for rank, beat in (moving or {}).items():
            write(store, rank, replace(beat, number=100 + number))
        watch._beat(store, "run")
    return watch._cause


def test_a_silent_neighbour_is_named() -> None:
    store, watch = HashStore(), Watch(0, 3)
    write(store, 1, OTHER)
    write(store, 2, OTHER)  # is process 1's to watch
    assert beaten(watch, store, SILENT_BEATS) is None
    cause = beaten(watch, store, 1)
    words = "process 1 of 3 (on far, pid 11) stopped answering: it was killed or hangs, after step 7, or a later one"
    assert cause == Cause(1, words)
    other = Watch(2, 3)
    assert beaten(other, store, 1) == cause, "all learn of it"


def test_a_neighbour_that_beats_or_left_or_is_not_up_is_not_missed() -> None:
    store, watch = HashStore(), Watch(2, 3)
    assert beaten(watch, store, 2 * SILENT_BEATS) is None
    assert beaten(watch, store, 2 * SILENT_BEATS, {0: OTHER}) is None
    write(store, 0, replace(OTHER, state="left"))
    assert beaten(watch, store, 2 * SILENT_BEATS) is None


def test_the_first_failure_counts() -> None:
    store, first, second = HashStore(), Watch(0, 2), Watch(1, 2)
    first._own_failure = Cause(0, "the first")
    second._own_failure = Cause(1, "the second")
    assert beaten(first, store, 1) == beaten(second, store, 1) == Cause(0, "the first")


def test_after_a_failed_collective_the_silent_are_named_at_once() -> None:
    store, watch = HashStore(), Watch(0, 4)
    watch._state = "broken"
    write(store, 3, OTHER)
    cause = beaten(watch, store, QUICK_BEATS + 1, {1: OTHER, 2: replace(OTHER, state="broken")})
    assert cause is not None
    assert cause.rank == 3
    assert "stopped answering" in cause.text


def test_the_one_that_did_not_come_is_named_where_all_beat() -> None:
    store, watch = HashStore(), Watch(0, 3)
    watch._state = "broken"
    moving = {1: replace(OTHER, state="broken"), 2: replace(OTHER, pid=12)}
    assert beaten(watch, store, QUICK_BEATS, moving) is None, "it may be about to notice, too"
    cause = beaten(watch, store, 2, moving)
    words = "process 2 of 3 (on far, pid 12) did not come to a collective that others waited in, after step 7, or a later one"
    assert cause == Cause(2, words)


def test_the_noted_step_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of the same launcher leaves a file, which tells more than its last beat did."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    watch = Watch()
    watch.start()
    for step in (8, 1234, 9):
        watch.finished(step)
    assert (tmp_path / STEP_FILE).read_text().strip() == "9"
    watch.close()
    watch.close()
    here = replace(OTHER, host=os.uname().nodename, parent=os.getppid(), step_file=str(tmp_path / STEP_FILE))
    store, other = HashStore(), Watch(0, 2)
    write(store, 1, replace(here, pid=_ended_process()))
    cause = beaten(other, store, SILENT_BEATS + 1)
    assert cause is not None
    assert cause.text.endswith(", after step 9")


def _ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_stopped_process_is_woken() -> None:
    """Else the launcher could not end it before its patience does."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        here = replace(OTHER, host=os.uname().nodename, parent=os.getppid(), pid=process.pid)
        Watch(0, 2)._awaken([here])
        _, status = os.waitpid(process.pid, os.WCONTINUED)
        assert os.WIFCONTINUED(status)
    finally:
        process.kill()
        process.wait()


class Over(BaseException):
    """Stands for the end of the process."""


def test_a_process_told_to_end_does_not_wait_for_a_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher ends the others when one has died. While all live, or left as they should, the main thread is to save."""

    def end(self: Watch, why: str) -> None:
        raise Over(why)

    monkeypatch.setattr(Watch, "_end", end)
    here = replace(OTHER, host=os.uname().nodename, parent=os.getppid(), pid=os.getpid())
    dead = replace(here, pid=_ended_process())
    store, watch = HashStore(), Watch(0, 3)
    write(store, 1, dead)
    assert beaten(watch, store, 1) is None, "nobody told it"
    watch.told_to_end()
    for harmless in (here, replace(dead, state="left"), replace(dead, parent=1)):
        write(store, 1, harmless)
        assert beaten(watch, store, 1) is None
    write(store, 2, dead)
    with pytest.raises(Over, match=r"process 2 of 3 .* is dead, after step 7"):
        beaten(watch, store, 1)


def test_one_process_explains_nothing() -> None:
    with pytest.raises(RuntimeError, match="gloo: connection closed"), Watch().explained():
        raise RuntimeError("gloo: connection closed")


class Alive:
    """Stands in for the thread."""

    def join(self, seconds: float) -> None: ...


def explained(watch: Watch, error: Exception) -> None:
    with watch.explained():
        raise error


def test_a_failed_collective_is_explained() -> None:
    watch = Watch(0, 2)
    watch._thread = Alive()  # type: ignore[assignment]
    watch._learn(json.dumps(asdict(Cause(1, "process 1 did it"))).encode())
    with pytest.raises(LostProcessError, match="process 1 did it") as caught:
        explained(watch, RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer [127.0.0.1]:1"))
    assert "Connection closed" in str(caught.value.__cause__)
    wrapped = ValueError("could not be saved")
    wrapped.__cause__ = RuntimeError("NCCL communicator was aborted")
    with pytest.raises(LostProcessError):
        explained(watch, wrapped)


def test_an_own_error_is_told_to_the_others() -> None:
    watch = Watch(1, 2)
    watch._thread = Alive()  # type: ignore[assignment]
    watch._told.set()
    watch.finished(3)
    with pytest.raises(ValueError, match="bad luck"):
        explained(watch, ValueError("bad luck\nand more"))
    store = HashStore()
    cause = beaten(watch, store, 1)
    assert cause is not None
    assert cause.text == f"process 1 of 2 (on {os.uname().nodename}) failed: ValueError: bad luck, after step 3"


def test_where_in_the_run() -> None:
    assert (after_step(None), after_step(0), after_step(5)) == ("before its first step was done", "after step 0", "after step 5")
