"""A step, validation or save that hangs is noticed, leaves every process's stacks, and ends the run; started again, it loses nothing."""

import json
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import pytest

from tests.distributed import CONTEXT
from tests.train.faults import faulty_forward, without_rows
from tests.train.runs import losses, rows, write_config
from titanarch.checkpoint import store
from titanarch.cli.main import main
from titanarch.data.loader import IndexedLoader
from titanarch.models.language_model import CausalLanguageModel
from titanarch.parallel.config import CommConfig
from titanarch.train import held_out, watch
from titanarch.train.update import Optimizers
from titanarch.train.watch import Watch
from titanarch.train.watchdog import HEARTBEAT_FILE, StepWatchdog

G, HANGING_UPDATE = 8, 6
OFF = ["--validation.enable", "false", "--evaluation.enable", "false", "--lr_scheduler.kind", "constant"]


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def watchdog_of(folder: Path, clock: Callable[[], float], **keys: float) -> StepWatchdog:
    return StepWatchdog(CommConfig.model_validate(keys), Watch(), folder, clock=clock)


def test_the_limit_is_the_larger_of_two(tmp_path: Path) -> None:
    clock = Clock()
    watchdog = watchdog_of(tmp_path, clock, init_timeout_seconds=50, step_timeout_seconds=20.0, step_timeout_factor=4.0)
    assert watchdog.limit_seconds == 50.0
    for step, seconds in enumerate((40.0, 3.0, 9.0, 5.0), 1):
        watchdog.begin(step)
        clock.seconds += seconds
        assert watchdog.overdue() is None
        watchdog.end()
    assert watchdog.limit_seconds == 4.0 * 7.0
    watchdog.begin(5)
    clock.seconds += 27.0
    with watchdog.paused():
        clock.seconds += 1000.0
        assert watchdog.overdue() is None
    assert watchdog.overdue() is None
    clock.seconds += 2.0
    assert watchdog.overdue() == "step 5 takes longer than 28 s (comm.step_timeout_seconds): it hangs"
    watchdog.end()
    assert watchdog.overdue() is None
    off = watchdog_of(tmp_path, clock, step_timeout_seconds=0.0)
    off.begin(1)
    clock.seconds += 1e9
    assert off.overdue() is None


def test_validations_and_saves_have_limits_of_their_own(tmp_path: Path) -> None:
    clock = Clock()
    limits = {"validation_timeout_seconds": 30.0, "save_timeout_seconds": 50.0}
    watchdog = watchdog_of(tmp_path, clock, step_timeout_factor=4.0, step_timeout_seconds=5.0, **limits)
    watchdog.begin(7)
    for seconds in (20.0, 10.0, 12.0):
        with watchdog.validating(7):
            clock.seconds += seconds
            assert watchdog.overdue() is None
    with watchdog.saving(7):
        clock.seconds += 49.0
        assert watchdog.overdue() is None
        clock.seconds += 2.0
        assert watchdog.overdue() == "the save after step 7 takes longer than 50 s (comm.save_timeout_seconds): it hangs"
    assert watchdog.overdue() is None, "the step itself took no time"
    with watchdog.validating(7):
        clock.seconds += 49.0
        expected = "the validation after step 7 takes longer than 48 s (comm.validation_timeout_seconds): it hangs"
        assert watchdog.overdue() == expected, "4 times the median"
    watchdog.end()
    with pytest.raises(OSError, match="full"), watchdog.saving(7):
        raise OSError("full")
    clock.seconds += 1e9
    assert watchdog.overdue() is None, "a save that failed is over"
    off = watchdog_of(tmp_path, clock, validation_timeout_seconds=0.0)
    with off.validating(0):
        clock.seconds += 1e9
        assert off.overdue() is None


def test_the_heart_beats_at_most_once_a_second(tmp_path: Path) -> None:
    clock, steps = Clock(), []
    watchdog = watchdog_of(tmp_path, clock)
    for step in range(1, 8):
        watchdog.begin(step)
        clock.seconds += 0.4
        watchdog.end()
        steps.append(json.loads((tmp_path / HEARTBEAT_FILE).read_text())["step"])
    assert steps == [1, 1, 1, 4, 4, 4, 7]
    beat = json.loads((tmp_path / HEARTBEAT_FILE).read_text())
    assert (beat["pid"], beat["host"]) == (os.getpid(), socket.gethostname())
    assert abs(beat["time"] - time.time()) < 60


def test_stacks_are_dumped_once(tmp_path: Path) -> None:
    watchdog = watchdog_of(tmp_path, time.monotonic)
    watchdog.begin(3)
    watchdog.dump()
    watchdog.dump()
    written = (tmp_path / "hangs/step-00000003-rank0.txt").read_text()
    assert written.count(f"pid {os.getpid()}, in step 3") == 1
    assert "test_stacks_are_dumped_once" in written


def sleep_in_the_update(hung: Path) -> None:
    time.sleep(600)
    hung.unlink()


def hang_once(hung: Path) -> Callable[[Optimizers], None]:
    """An update that never ends, the HANGING_UPDATE-th of process 1, unless one hung already."""
    step, n_updates = Optimizers.step, 0

    def wrapped(self: Optimizers) -> None:
        nonlocal n_updates
        n_updates += 1
        if n_updates == HANGING_UPDATE and os.environ["RANK"] == "1" and not hung.exists():
            hung.touch()
            sleep_in_the_update(hung)
        step(self)

    return wrapped


def sleep_for_ever(*_: object, **__: object) -> None:
    time.sleep(600)


@dataclass(frozen=True)
class Hang:
    """Where process 1 hangs: ``place``, an update (once, and noted in the file), the first validation or the first upload."""

    place: Literal["update", "validation", "upload"]
    noted: Path

    def __call__(self) -> None:
        if self.place == "update":
            Optimizers.step = hang_once(self.noted)  # type: ignore[method-assign, assignment]
        elif os.environ["RANK"] == "1" and self.place == "validation":
            held_out.validation_loss = sleep_for_ever  # type: ignore[assignment, attr-defined]
        elif os.environ["RANK"] == "1":
            store.upload = sleep_for_ever  # type: ignore[assignment, attr-defined]


def train_as(rank: int, port: int, said: Path, before: Callable[[], None], arguments: list[str]) -> None:
    """One of two processes, as a launcher starts it; ``before``: what it does first. ``said``: of both, what they write to stderr."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    watch.GRACE_SECONDS = 1.0  # the one that hangs does not end by itself
    before()
    raise SystemExit(main(["train", *arguments]))


def start_two(before: Callable[[], None], said: Path, config: Path, *options: str) -> list[int | None]:
    """Both processes to their ends; their statuses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = ["--config", str(config), *options]
    processes: list[BaseProcess] = [CONTEXT.Process(target=train_as, args=(rank, port, said, before, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120.0)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def stacks_of(folder: Path, step: int) -> list[str]:
    """Those that both processes left, in order; they were in ``step``."""
    files = sorted((folder / "hangs").iterdir(), key=lambda file: file.name)
    assert [file.name for file in files] == [f"step-{step:08d}-rank{rank}.txt" for rank in range(2)], "every step is logged"
    return [file.read_text() for file in files]


def with_faults(hang: Hang, faults: dict[int, str]) -> None:
    CausalLanguageModel.forward = faulty_forward(faults)  # type: ignore[method-assign]
    hang()


@pytest.mark.parametrize(
    ("place", "options", "words"),
    [
        (
            "validation",
            ["--validation.interval", "2", "--comm.validation_timeout_seconds", "3"],
            r"the validation after step 2 takes longer than 3 s \(comm.validation_timeout_seconds\): it hangs; the stacks",
        ),
        (
            "upload",
            [*OFF, "--checkpoint.interval", "3", "--checkpoint.async_mode", "disabled", "--comm.save_timeout_seconds", "3"],
            r"the save after step 3 takes longer than 3 s \(comm.save_timeout_seconds\): it hangs; the stacks",
        ),
    ],
    ids=["validation", "save"],
)
def test_two_processes_end_where_one_hangs(tmp_path: Path, place: Literal["validation", "upload"], options: list[str], words: str) -> None:
    config, said = write_config(tmp_path, "run", tmp_path / "cache"), tmp_path / "said"
    assert start_two(Hang(place, tmp_path / "hung"), said, config, *options, "--evaluation.enable", "false") == [1, 1]
    assert re.search(words, said.read_text()), said.read_text()
    stacks = stacks_of(tmp_path / "run", 2 if place == "validation" else 3)
    assert ["in sleep_for_ever" in stack for stack in stacks] == [False, True]
    assert "in validation_loss" in stacks[0] if place == "validation" else "in save" in stacks[0]


def test_two_processes_go_back_hang_and_are_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 3 is bad on process 1 alone, and both go back to step 2; the sixth update of process 1 hangs; then all goes on."""
    config, hung = write_config(tmp_path, "two", tmp_path / "cache"), tmp_path / "hung"
    before = partial(with_faults, Hang("update", hung), {2 * G + 5: "nan"})
    limits = ["--comm.step_timeout_seconds", "6", "--comm.init_timeout_seconds", "60"]
    keys = ["--training.steps", "9", "--bad_gradients.nonfinite", "roll_back", "--checkpoint.interval", "2", *OFF, *limits]
    assert start_two(before, tmp_path / "said", config, *keys) == [1, 1]
    assert hung.exists()
    stacks = stacks_of(tmp_path / "two", HANGING_UPDATE)
    assert ["in sleep_in_the_update" in stack for stack in stacks] == [False, True]
    assert start_two(before, tmp_path / "said", config, *keys) == [0, 0]

    alone = write_config(tmp_path, "alone", tmp_path / "cache")
    monkeypatch.setattr(IndexedLoader, "__next__", without_rows(range(2 * G, 3 * G)))
    assert main(["train", "--config", str(alone), "--training.steps", "9", *OFF]) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=1e-6)
    (back,) = [row for row in rows(tmp_path / "two") if "rolled_back_from" in row]
    assert (back["step"], back["rolled_back_from"]) == (3, 3)
    report = json.loads((tmp_path / "two/reports/step-3.json").read_text())
    assert sorted(map(int, report["text"])) == list(range(2 * G, 3 * G)), "the rows of both processes"
    assert report["gradients_not_finite"] == ["layers.1.channel.down.weight"]
    total = {each["step"]: each["grad_norm"] for each in report["last_norms"]}
    by_layer = {each["step"]: each["norms"].values() for each in report["last_norms_by_layer"]}
    assert [sum(norm**2 for norm in by_layer[step]) ** 0.5 for step in (1, 2)] == pytest.approx([total[1], total[2]], rel=1e-5)
    assert json.loads((tmp_path / "two" / HEARTBEAT_FILE).read_text())["step"] <= 9
