"""The step meter against hand-computed figures on a clock that the test moves."""

import mmap
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from titanarch.train.metrics.memory import process_gib
from titanarch.train.metrics.meter import StepMeter


class Clock:
    """A clock that stands still unless told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class CountOps(TorchDispatchMode):
    """Counts the operations that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def make_meter(clock: Clock, *, peak: float | None = 1e12, reduce: Any = None) -> StepMeter:
    return StepMeter(
        device=torch.device("cpu"),
        n_devices=4,
        training_flops_per_token=6e6,
        peak_flops_per_second=peak,
        sum_over_processes=reduce,
        clock=clock,
    )


def slow_batches(clock: Clock, seconds: float) -> Iterator[int]:
    for batch in range(100):
        clock.now += seconds
        yield batch


def test_speeds_of_an_interval() -> None:
    clock = Clock()
    meter = make_meter(clock)
    meter.start(0.0)
    batches = meter.timed(slow_batches(clock, 0.25))
    for _ in range(2):
        assert next(batches) is not None
        clock.now += 1.75
        meter.step_done(1000, {})
    row = meter.row(2, tokens=2000, fraction=0.1)
    assert row["step"] == 2
    assert row["tokens"] == 2000
    assert row["tokens_per_second"] == pytest.approx(2000 / 4.0)
    assert row["step_seconds"] == pytest.approx(2.0)
    assert row["data_seconds"] == pytest.approx(0.25)
    assert row["mfu"] == pytest.approx(6e6 * 2000 / 4.0 / (4 * 1e12))
    # Ten percent took four seconds, so ninety take thirty-six.
    assert row["eta_seconds"] == pytest.approx(36.0)


def test_pauses_are_left_out_and_intervals_do_not_overlap() -> None:
    clock = Clock()
    meter = make_meter(clock, peak=None)
    meter.start(0.5)
    clock.now += 3
    meter.step_done(600, {})
    assert meter.row(1, tokens=600, fraction=0.5)["tokens_per_second"] == pytest.approx(200)
    clock.now += 1
    with meter.paused():
        clock.now += 50
    clock.now += 1
    meter.step_done(600, {})
    row = meter.row(2, tokens=1200, fraction=0.75)
    assert "mfu" not in row
    assert row["step_seconds"] == pytest.approx(2.0)
    # Since the first row: a quarter of the run in 52 s of wall time, the pause included; a quarter is left.
    assert row["eta_seconds"] == pytest.approx(52.0)
    totals = meter.totals()
    assert totals["train_seconds"] == pytest.approx(5.0)
    assert totals["tokens_per_second"] == pytest.approx(240)


def test_eta_is_left_out_until_there_is_progress() -> None:
    clock = Clock()
    meter = make_meter(clock)
    meter.start(0.3)
    clock.now += 1
    meter.step_done(1, {})
    assert "eta_seconds" not in meter.row(1, tokens=1, fraction=0.3)


def test_scalars_are_means_and_partials_are_summed_over_processes_once_a_row() -> None:
    clock = Clock()
    calls: list[int] = []

    def as_if_three_processes(stacked: torch.Tensor) -> torch.Tensor:
        calls.append(stacked.numel())
        return stacked * 3

    meter = make_meter(clock, reduce=as_if_three_processes)
    meter.start(0.0)
    for loss, norm in ((1.0, 4.0), (2.0, 8.0), (4.5, 3.0)):
        clock.now += 1
        meter.step_done(10, {"grad_norm": torch.tensor(norm)}, {"loss": torch.tensor(loss), "z_loss": torch.tensor(loss / 10)})
    row = meter.row(3, tokens=30, fraction=0.1)
    assert calls == [6]
    assert row["loss"] == pytest.approx(3 * statistics.mean([1.0, 2.0, 4.5]))
    assert row["z_loss"] == pytest.approx(3 * statistics.mean([0.1, 0.2, 0.45]))
    assert row["grad_norm"] == pytest.approx(5.0)
    clock.now += 1
    meter.step_done(10, {"grad_norm": torch.tensor(7.0)}, {"loss": torch.tensor(1.0)})
    assert meter.row(4, tokens=40, fraction=0.2)["grad_norm"] == 7.0


def test_a_step_runs_no_operation_on_the_device() -> None:
    meter = make_meter(Clock())
    loss = torch.tensor(1.0)
    with CountOps() as ops:
        meter.step_done(10, {"grad_norm": loss}, {"loss": loss})
    assert ops.names == []


def test_a_step_costs_less_than_ten_microseconds() -> None:
    meter = StepMeter(device=torch.device("cpu"), n_devices=1, training_flops_per_token=1.0, peak_flops_per_second=None)
    loss, batches = torch.tensor(1.0), meter.timed(range(10_000))
    times = []
    for _ in range(20):
        started = time.process_time()
        for _ in range(200):
            next(batches)
            meter.step_done(4096, {"grad_norm": loss}, {"loss": loss})
        times.append((time.process_time() - started) / 200)
    assert min(times) < 10e-6


def test_memory_on_a_cpu_follows_the_process() -> None:
    before = process_gib()
    with mmap.mmap(-1, 2**28) as block:  # an allocator may have as much from tests before
        for page in range(0, 2**28, mmap.PAGESIZE):
            block[page] = 1
        assert process_gib() - before == pytest.approx(0.25, abs=0.05)


def test_importing_the_metrics_imports_no_slow_package() -> None:
    code = (
        "import sys, titanarch.train.metrics.log, titanarch.train.metrics.meter, titanarch.train.run_folder;"
        "print([m for m in ('tensorboard', 'matplotlib', 'wandb', 'rich.live', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
