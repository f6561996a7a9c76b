"""A step that hangs is noticed, leaves every process's stacks, and ends the run; started again, the run loses nothing."""

import json
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.distributed import CONTEXT
from tests.train.faults import faulty_forward, without_rows
from tests.train.runs import losses, rows, write_config
from titanarch.cli.main import main
from titanarch.data.loader import IndexedLoader
from titanarch.models.language_model import CausalLanguageModel
from titanarch.parallel.config import CommConfig
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


def train_as(rank: int, port: int, config: str, hung: str, faults: dict[int, str]) -> None:
    """One of two processes, as a launcher starts it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    CausalLanguageModel.forward = faulty_forward(faults)  # type: ignore[method-assign]
    Optimizers.step = hang_once(Path(hung))  # type: ignore[method-assign, assignment]
    limits = ["--comm.step_timeout_seconds", "6", "--comm.init_timeout_seconds", "60"]
    keys = ["--training.steps", "9", "--bad_gradients.nonfinite", "roll_back", "--checkpoint.interval", "2"]
    raise SystemExit(main(["train", "--config", config, *keys, *OFF, *limits]))


def start_two(config: Path, hung: Path, faults: dict[int, str]) -> list[int | None]:
    """Both processes to their ends; their statuses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes: list[BaseProcess] = [
        CONTEXT.Process(target=train_as, args=(rank, port, str(config), str(hung), faults)) for rank in range(2)
    ]
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


def test_two_processes_go_back_hang_and_are_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 3 is bad on process 1 alone, and both go back to step 2; the sixth update of process 1 hangs; then all goes on."""
    config, hung, faults = write_config(tmp_path, "two", tmp_path / "cache"), tmp_path / "hung", {2 * G + 5: "nan"}
    assert start_two(config, hung, faults) == [1, 1]
    assert hung.exists()
    files = sorted((tmp_path / "two/hangs").iterdir(), key=lambda file: file.name.partition("rank")[2])
    stacks = [file.read_text() for file in files]
    assert [file.name.partition("-rank")[2] for file in files] == ["0.txt", "1.txt"]
    assert [file.name.partition("-rank")[0] for file in files] == [f"step-0000000{HANGING_UPDATE}"] * 2, "every step is logged"
    assert "in sleep_in_the_update" in stacks[1]
    assert "in sleep_in_the_update" not in stacks[0]
    assert start_two(config, hung, faults) == [0, 0]

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
