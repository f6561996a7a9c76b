"""Runs that are told to end by a signal: they stop together, have saved, say so by their status, and lose nothing."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import free_port
from tests.train.runs import arguments_of, environment, losses, rows, start, train, write_config
from titanarch.checkpoint.marker import MARKER
from titanarch.checkpoint.store import Checkpointer
from titanarch.cli.main import main
from titanarch.config.errors import ConfigError, Problem
from titanarch.data.batch import Batch
from titanarch.data.loader import IndexedLoader
from titanarch.train import trainer
from titanarch.train.held_out import HeldOut
from titanarch.train.step import StepOutcome, TrainStep
from titanarch.train.stopping import SIGNALS, Stopping
from titanarch.train.trainer import Trainer
from titanarch.train.watch import Watch

ENDLESS = ["--training.steps", "1000000", "--checkpoint.interval", "1000000"]
PLAIN = ["--data.allow_repeat", "true", "--lr_scheduler.kind", "constant", "--evaluation.enable", "false"]
OFTEN = ["--validation.enable", "false"]


def told(
    config: Path, folder: Path, number: signal.Signals, tell: Callable[[int, int], None], *options: str, n: int = 1
) -> list[int | None]:
    """Statuses of ``n`` processes that train for ever; once some steps are logged, ``tell`` sends signal ``number`` to the last one."""
    shared = environment() | {"MASTER_ADDR": "127.0.0.1"}
    if n > 1:
        shared |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n)}
    forks = []
    for rank in range(n):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if n > 1 else {}
        output = (folder.with_suffix(f".out-{rank}"), folder.with_suffix(f".err-{rank}"))
        forks.append(start(arguments_of(config, *PLAIN, *ENDLESS, *options), shared | place, output))
    try:
        deadline = time.monotonic() + 200
        while max((row["step"] for row in rows(folder)), default=0) < 7:
            assert time.monotonic() < deadline, "it makes no steps"
            assert all(fork.is_alive() for fork in forks), output[1].read_text()
            time.sleep(0.02)
        assert forks[-1].pid is not None
        tell(forks[-1].pid, number)
        for fork in forks:
            fork.join(120)
        return [fork.exitcode for fork in forks]
    finally:
        for fork in forks:
            fork.kill()
            fork.join()


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step-")) for path in folder.glob(f"checkpoints/*/{MARKER}"))


@pytest.mark.parametrize(
    ("number", "tell", "options", "helpers"),
    [
        (signal.SIGUSR1, os.kill, [], []),
        (signal.SIGTERM, os.killpg, [*OFTEN, "--checkpoint.interval", "3"], ["--checkpoint.async_mode=process", "--data.workers=2"]),
    ],
    ids=["the process", "all that it started too"],
)
def test_one_process_saves_and_ends(
    tmp_path: Path, number: signal.Signals, tell: Callable[[int, int], None], options: list[str], helpers: list[str]
) -> None:
    """The second has data workers and a process that uploads, and schedulers send the signal to these as well."""
    path, whole = (write_config(tmp_path, name, tmp_path / "cache") for name in ("told", "whole"))
    folder = tmp_path / "told"
    assert told(path, folder, number, tell, *options, *helpers) == [128 + number], folder.with_suffix(".err-0").read_text()
    last = max(losses(folder))
    assert saved_steps(folder)[-1] == last
    assert not (folder / "result.json").exists()
    said = folder.with_suffix(".err-0").read_text()
    assert f"told to end by {number.name} after step {last}: the same command goes on from step {last}\n" in said
    steps = ["--training.steps", str(last + 3), *PLAIN, *options]
    train(path, *steps)
    assert not (folder / "metrics.discarded.jsonl").exists(), "no step is made twice"
    train(whole, *steps)
    assert losses(folder) == losses(tmp_path / "whole")
    validated = [[row for row in rows(each) if "validation_loss" in row] for each in (folder, tmp_path / "whole")]
    assert validated[0] == validated[1]


def test_two_processes_stop_after_the_same_step(tmp_path: Path) -> None:
    """The second alone is told; every tenth step is validated, and the rows of a run that nobody told are those of this one."""
    path, alone = (write_config(tmp_path, name, tmp_path / "cache") for name in ("two", "alone"))
    folder = tmp_path / "two"
    assert told(path, folder, signal.SIGTERM, os.kill, n=2) == [143, 143], folder.with_suffix(".err-1").read_text()
    (last,) = saved_steps(folder)
    assert last == max(losses(folder))
    train(path, *PLAIN, "--training.steps", str(last + 2), n_processes=2)
    train(alone, *PLAIN, "--training.steps", str(last + 2))
    assert losses(folder) == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)
    assert sorted(losses(folder)) == list(range(1, last + 3))


def is_told(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    make = TrainStep.__call__

    def told_in(self: TrainStep, number: int, batches: Sequence[Batch]) -> StepOutcome:
        if number == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return make(self, number, batches)

    monkeypatch.setattr(TrainStep, "__call__", told_in)


def runs_out(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setattr(IndexedLoader, "ended", property(lambda self: "no more rows" if self.next_row >= 8 * step else ""))


def repeats(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    def check(loader: IndexedLoader, *_: object, **__: object) -> None:
        if loader.next_row >= 8 * step:
            raise ConfigError(Problem("enough"))

    monkeypatch.setattr(trainer, "check_next_step", check)


def note_what_is_done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a run in this process validates and saves from now on, with the step that it has come to."""
    done: list[str] = []
    step, (draw, validate, save) = [0], (Trainer.draw, HeldOut.validate, Checkpointer.save)

    def drawing(self: Trainer, batches: Iterator[Batch]) -> list[Batch]:
        step[0] += 1
        return draw(self, batches)

    def validating(self: HeldOut, number: int) -> dict[str, float]:
        done.append(f"validate {step[0]}")
        return validate(self, number)

    def saving(self: Checkpointer, number: int, *arguments: Any, **keys: Any) -> None:
        done.append(f"save {number}")
        save(self, number, *arguments, **keys)

    monkeypatch.setattr(Trainer, "draw", drawing)
    monkeypatch.setattr(HeldOut, "validate", validating)
    monkeypatch.setattr(Checkpointer, "save", saving)
    return done


@pytest.mark.parametrize(
    ("end", "step", "save_every", "status", "order"),
    [
        (is_told, 4, 99, 138, ["validate 2", "save 4", "validate 4"]),
        (is_told, 3, 99, 138, ["validate 2", "save 3"]),
        (runs_out, 4, 4, 0, ["validate 2", "validate 4", "save 4"]),
        (runs_out, 3, 3, 0, ["validate 2", "validate 3", "save 3"]),
        (runs_out, 3, 99, 0, ["validate 2", "validate 3", "save 3"]),
        (repeats, 4, 99, 2, ["validate 2", "validate 4", "save 4"]),
        (repeats, 4, 4, 2, ["validate 2", "validate 4", "save 4"]),
    ],
)
def test_what_is_validated_at_an_early_end_is_saved_with_its_loss(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: Callable[[pytest.MonkeyPatch, int], None],
    step: int,
    save_every: int,
    status: int,
    order: list[str],
) -> None:
    """Each state is validated once and saved once; a signal waits for the save first, and the loss is added to it."""
    done = note_what_is_done(monkeypatch)
    end(monkeypatch, step)
    path, folder = write_config(tmp_path, "run", tmp_path / "cache"), tmp_path / "run"
    options = ["--validation.interval", "2", "--checkpoint.interval", str(save_every), "--evaluation.enable", "false"]
    assert main(arguments_of(path, *options)) == status
    assert done == order
    measured = {row["step"]: row["validation_loss"] for row in rows(folder) if "validation_loss" in row}
    marker = json.loads((folder / f"checkpoints/step-{step:08d}" / MARKER).read_text())
    assert marker["validation_loss"] == measured.get(step)
    assert (step in measured) == (f"validate {step}" in order)
    assert saved_steps(folder) == [step]
    assert main(["checkpoint", "verify", str(folder)]) == 0


def test_signals_are_heard_while_it_is_entered() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    stopping = Stopping(Watch())
    with stopping:
        assert not stopping.agreed()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.agreed()
        assert stopping.signal == signal.SIGUSR1, "the first counts"
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_how_often_processes_ask_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second apart by the slowest one's pace; each alike, since all hear the same."""
    asked: list[float] = []

    def all_reduce(heard: object, op: object) -> None:
        asked.append(seconds)

    monkeypatch.setattr("titanarch.train.stopping.dist.all_reduce", all_reduce)
    seconds = 0.0
    stopping = Stopping(Watch(0, 2), clock=lambda: seconds)
    for _ in range(40):
        seconds += 0.0625
        assert not stopping.agreed()
    assert asked == [0.0625, 0.5625, 1.0625, 1.5625, 2.0625]
    stopping.told = signal.SIGTERM
    told_after = next(n for n in range(1, 9) if stopping.agreed())
    assert (told_after, stopping.signal) == (1, signal.SIGTERM)


def test_a_number_of_all_is_asked_for_with_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one reduction, after which nobody asks again at once; one process asks nobody."""
    others, asked = [0.0, 0.0, -math.inf], list[list[float]]()

    def all_reduce(heard: torch.Tensor, op: object) -> None:
        asked.append(heard.tolist())
        heard.copy_(torch.maximum(heard, torch.tensor(others, dtype=torch.float64)))

    monkeypatch.setattr("titanarch.train.stopping.dist.all_reduce", all_reduce)
    seconds = 0.0
    stopping = Stopping(Watch(0, 2), clock=lambda: seconds)
    for _ in range(8):
        seconds += 0.0625
        assert stopping.least(math.inf) == math.inf
        assert not stopping.agreed()
    assert len(asked) == 8
    row = float(10**14 + 1)
    others[2] = -row
    assert stopping.least(row + 1) == stopping.least(row) == stopping.least(math.inf) == row
    others[0] = float(signal.SIGUSR1)
    assert stopping.least(row - 1) == row - 1
    assert (stopping.signal, stopping.agreed()) == (signal.SIGUSR1, True)
    asked.clear()
    alone = Stopping(Watch())
    assert (alone.least(7.0), alone.signal) == (7.0, 0)
    alone.told = signal.SIGTERM
    assert (alone.least(math.inf), alone.signal) == (math.inf, signal.SIGTERM)
    assert asked == []
