"""What a step costs: accumulated on the host, read from the device only when a row is due."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from titanarch.train.metrics.memory import MemoryMeter

Item = TypeVar("Item")


@dataclass
class Interval:
    """Sums over a stretch of steps. ``seconds`` leaves out what was paused."""

    steps: int = 0
    tokens: int = 0
    training_flops: float = 0.0
    seconds: float = 0.0
    data_seconds: float = 0.0

    def add(self, other: "Interval") -> None:
        """Add another stretch's sums."""
        self.steps += other.steps
        self.tokens += other.tokens
        self.training_flops += other.training_flops
        self.seconds += other.seconds
        self.data_seconds += other.data_seconds


class StepMeter:
    """Times steps and collects their scalars, with no synchronisation with the device between rows.

    A step of the loop: take batches from ``timed(loader)``, train, then ``step_done(tokens, scalars)``. When a row is
    due, ``row`` on every process. Validation, evaluation and saving go inside ``paused()``.

    ``n_devices`` is the number of processes; ``peak_flops_per_second`` is one device's (None: no MFU).
    ``training_flops_per_token`` is ``Cost.training_flops_per_token`` at the length trained on; where the length changes,
    assign the attribute. ``sum_over_processes`` reduces the stacked partial scalars, once a row.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        n_devices: int,
        training_flops_per_token: float,
        peak_flops_per_second: float | None,
        sum_over_processes: Callable[[Tensor], Tensor] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.training_flops_per_token = training_flops_per_token
        self._device = device
        self._memory = MemoryMeter(device)
        self._peak = None if peak_flops_per_second is None else n_devices * peak_flops_per_second
        self._sum_over_processes = sum_over_processes
        self._clock = clock
        self._total = Interval()
        self._now = Interval()
        self._scalars: dict[str, list[Tensor]] = {}
        self._partials: dict[str, list[Tensor]] = {}
        self._interval_start = self._clock()
        self._paused_seconds = 0.0
        self._eta_start = (self._interval_start, 0.0)
        self._n_rows = 0

    def start(self, fraction: float) -> None:
        """The loop begins now, or again; ``fraction`` of the run (0 to 1) was done before. Steps that are in no row are forgotten."""
        self._now = Interval()
        self._partials.clear()
        self._scalars.clear()
        self._interval_start, self._paused_seconds = self._clock(), 0.0
        self._eta_start = (self._interval_start, fraction)

    def timed(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same batches; the time waited for each counts as ``data_seconds``."""
        iterator = iter(batches)
        while True:
            try:
                with self.waiting():
                    batch = next(iterator)
            except StopIteration:
                return
            yield batch

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside waits for rows, and counts as ``data_seconds``."""
        started = self._clock()
        try:
            yield
        finally:
            self._now.data_seconds += self._clock() - started

    def step_done(self, tokens: int, scalars: Mapping[str, Tensor], partials: Mapping[str, Tensor] | None = None) -> None:
        """End of an optimizer step over ``tokens`` tokens of the whole run.

        ``scalars``: 0-d detached tensors that are alike on all processes (grad_norm). ``partials``: 0-d detached tensors
        whose sum over processes is the value (a loss divided by the global count of targets). They are kept, not read:
        each must be a tensor that nothing writes to later. The row has their means over its steps.
        """
        now = self._now
        now.steps += 1
        now.tokens += tokens
        now.training_flops += tokens * self.training_flops_per_token
        for name, value in scalars.items():
            self._scalars.setdefault(name, []).append(value)
        for name, value in (partials or {}).items():
            self._partials.setdefault(name, []).append(value)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the step times. Waits for the device at both ends."""
        self._synchronize()
        started = self._clock()
        try:
            yield
        finally:
            self._synchronize()
            self._paused_seconds += self._clock() - started

    def row(self, step: int, *, tokens: int, fraction: float) -> dict[str, float | int]:
        """The row of the steps since the last one, at ``tokens`` tokens of the run, ``fraction`` (0 to 1) of which is done.

        Keys: step, tokens, the scalars, tokens_per_second (all devices), step_seconds, data_seconds (means a step, this
        process), mfu (dense peak, forward FLOPs x 3), memory_gib (this process), eta_seconds. A quantity that cannot
        be known (MFU without a peak, the time left before any progress) is left out. Collective if ``partials`` are used.
        """
        assert self._now.steps > 0, "a row needs at least one step since the last one"
        values = self._read_scalars()
        # The device has finished the interval's steps only after its scalars have arrived: read the clock after them.
        now, interval = self._clock(), self._now
        interval.seconds = self._elapsed(now)
        row: dict[str, float | int] = {"step": step, "tokens": tokens, **values, **self._speeds(interval)}
        row["step_seconds"] = interval.seconds / interval.steps
        row["data_seconds"] = interval.data_seconds / interval.steps
        row["memory_gib"] = self._memory.read_gib()
        eta_seconds = self._eta(now, fraction)
        if eta_seconds is not None:
            row["eta_seconds"] = eta_seconds
        self._total.add(interval)
        self._now = Interval()
        self._interval_start, self._paused_seconds = now, 0.0
        return row

    def totals(self) -> dict[str, float | int]:
        """Of this start, for ``result.json``: train_seconds, data_seconds, tokens_per_second, mfu, peak_memory_gib."""
        self._synchronize()
        total = Interval()
        total.add(self._total)
        self._now.seconds = self._elapsed(self._clock()) if self._now.steps else 0.0
        total.add(self._now)
        self._memory.read_gib()
        return {
            "train_seconds": total.seconds,
            "data_seconds": total.data_seconds,
            **(self._speeds(total) if total.steps else {}),
            "peak_memory_gib": self._memory.peak_gib,
        }

    def _elapsed(self, now: float) -> float:
        return now - self._interval_start - self._paused_seconds

    def _speeds(self, interval: Interval) -> dict[str, float | int]:
        speeds: dict[str, float | int] = {"tokens_per_second": interval.tokens / interval.seconds}
        if self._peak is not None:
            speeds["mfu"] = interval.training_flops / interval.seconds / self._peak
        return speeds

    def _read_scalars(self) -> dict[str, float]:
        """Means over the interval's steps, in one transfer from the device for each of the two kinds."""
        means: dict[str, float] = {}
        for kept, reduce in ((self._partials, self._sum_over_processes), (self._scalars, None)):
            if not kept:
                continue
            stacked = torch.stack([value for values in kept.values() for value in values])
            numbers = iter((stacked if reduce is None else reduce(stacked)).tolist())
            for name, values in kept.items():
                means[name] = sum(next(numbers) for _ in values) / len(values)
            kept.clear()
        return means

    def _eta(self, now: float, fraction: float) -> float | None:
        since, fraction_then = self._eta_start
        if self._n_rows == 0:
            # The first row holds compilation and warm-up: later estimates go by what came after it.
            self._eta_start = (now, fraction)
        self._n_rows += 1
        done = fraction - fraction_then
        return (1 - fraction) * (now - since) / done if done > 0 else None

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
