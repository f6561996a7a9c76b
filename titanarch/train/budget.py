"""How long a run trains: so many steps, tokens or minutes, and how far along it is."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from titanarch.config.errors import ConfigError, Problem
from titanarch.data.phases import Phases

SECONDS_BETWEEN_AGREEMENTS = 0.5
"""How long processes of a run by minutes go on by an estimate before they hear the time from process 0 again."""
MOST_STEPS_BETWEEN_AGREEMENTS = 1000


class Stopwatch:
    """Seconds spent training, over all starts of a run; validation and the like may be left out by ``paused``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock``: seconds from any origin."""
        self._clock = clock
        self._before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        return self._before if self._started is None else self._before + self._clock() - self._started

    def start(self) -> None:
        """Go on from what has been counted; nothing if it runs already."""
        if self._started is None:
            self._started = self._clock()

    def stop(self) -> None:
        self._before = self.seconds
        self._started = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the count."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def state_dict(self) -> dict[str, float]:
        return {"elapsed_seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a saved count; the time since ``start`` is dropped."""
        self._before = state["elapsed_seconds"]
        if self._started is not None:
            self._started = self._clock()


class Budget(ABC):
    """How much training a run gets.

    ``fraction``: the share spent before the next step, 0 to 1. ``done``: whether no step is left. ``total_steps``: steps
    of the whole run, None where only time will tell. Call ``start`` once the state is loaded, then ``advance`` after
    each step, on all processes alike; both numbers are then the same everywhere.
    """

    total_steps: int | None = None

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.fraction = 0.0
        self.done = False

    def start(self, step: int, tokens: int) -> None:
        """Start the clock of a run that has made ``step`` steps on ``tokens`` tokens."""
        self.stopwatch.start()
        self.advance(step, tokens)

    def advance(self, step: int, tokens: int) -> None:
        """Bring ``fraction`` and ``done`` up to date; ``step`` and ``tokens`` are those of the whole run so far."""
        spent = self._spent(step, tokens)
        self.fraction = min(spent, 1.0)
        self.done = spent >= 1.0

    def roll_back(self, step: int, tokens: int) -> None:
        """The run has gone back to ``step`` and ``tokens``. Time that was spent stays spent."""
        self.advance(step, tokens)

    @abstractmethod
    def _spent(self, step: int, tokens: int) -> float:
        """The share spent, above 1 where the last step overshot."""

    @abstractmethod
    def fraction_after(self, n_steps: int) -> float | None:
        """The share that ``n_steps`` from the start spend, or None where only time will tell; may exceed 1."""

    def state_dict(self) -> dict[str, float]:
        return self.stopwatch.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over the time that earlier starts of the run spent; before ``start``."""
        self.stopwatch.load_state_dict(state)


class StepBudget(Budget):
    """``n_steps`` optimizer steps."""

    def __init__(self, n_steps: int, stopwatch: Stopwatch) -> None:
        super().__init__(stopwatch)
        self.total_steps: int = n_steps

    def _spent(self, step: int, tokens: int) -> float:
        return step / self.total_steps

    def fraction_after(self, n_steps: int) -> float:
        return n_steps / self.total_steps


class TokenBudget(Budget):
    """``n_tokens`` tokens, rounded up to whole steps, whose sizes ``phases`` has."""

    def __init__(self, n_tokens: int, stopwatch: Stopwatch, *, phases: Phases) -> None:
        super().__init__(stopwatch)
        self.n_tokens = n_tokens
        self.phases = phases
        self.total_steps: int = phases.steps_for(n_tokens)

    def _spent(self, step: int, tokens: int) -> float:
        return tokens / self.n_tokens

    def fraction_after(self, n_steps: int) -> float:
        return self.phases.tokens_before(n_steps) / self.n_tokens


class TimeBudget(Budget):
    """``seconds`` on process 0's stopwatch.

    The processes hear process 0's time about twice a second, through one broadcast of a CPU tensor; between, they all
    extrapolate alike from the pace they heard. So no step waits for a clock, and all stop at the same step.
    """

    def __init__(self, seconds: float, stopwatch: Stopwatch) -> None:
        super().__init__(stopwatch)
        self.seconds = seconds
        self._heard_seconds = 0.0
        self._heard_step: int | None = None
        self._step_seconds = 0.0
        self._next_agreement = 0

    def _spent(self, step: int, tokens: int) -> float:
        if self._heard_step is None or step >= self._next_agreement:
            self._agree(step)
        assert self._heard_step is not None, "agreed above"
        seconds = self._heard_seconds + (step - self._heard_step) * self._step_seconds
        return max(seconds / self.seconds, self.fraction)  # an estimate may have run ahead of the clock

    def fraction_after(self, n_steps: int) -> None:
        return None

    def roll_back(self, step: int, tokens: int) -> None:
        self._heard_step = None
        super().roll_back(step, tokens)

    def _agree(self, step: int) -> None:
        """Take process 0's time, its pace, and the step of the next agreement."""
        seconds = self.stopwatch.seconds
        pace = 0.0 if self._heard_step is None or step <= self._heard_step else (seconds - self._heard_seconds) / (step - self._heard_step)
        interval = 1
        if dist.is_initialized() and dist.get_world_size() > 1:
            if pace > 0:
                until = min(SECONDS_BETWEEN_AGREEMENTS, max(self.seconds - seconds, 0.0))
                interval = max(1, min(int(until / pace), MOST_STEPS_BETWEEN_AGREEMENTS))
            heard = torch.tensor([seconds, pace, float(interval)], dtype=torch.float64)
            dist.broadcast(heard, src=0)
            seconds, pace, interval = float(heard[0]), float(heard[1]), int(heard[2])
        self._heard_seconds, self._step_seconds = seconds, pace
        self._heard_step, self._next_agreement = step, step + interval


def build_budget(
    *, steps: int | None, tokens: int | None, minutes: float | None, phases: Phases, stopwatch: Stopwatch | None = None
) -> Budget:
    """The budget by whichever of [training] steps, tokens and minutes is given.

    ``phases``: of the run. Raises ConfigError unless exactly one is given and it is above 0.
    """
    given = {name: value for name, value in (("steps", steps), ("tokens", tokens), ("minutes", minutes)) if value is not None}
    if len(given) != 1:
        found = " and ".join(f"{name} = {value}" for name, value in given.items()) or "none of them"
        raise ConfigError(Problem(f"a run is as long as one of steps, tokens and minutes says, and {found} is given", key="training.steps"))
    name, value = next(iter(given.items()))
    if not value > 0:
        raise ConfigError(Problem(f"{value} is no length of a run: give a number above 0", key=f"training.{name}"))
    stopwatch = stopwatch or Stopwatch()
    if steps is not None:
        return StepBudget(steps, stopwatch)
    if tokens is not None:
        return TokenBudget(tokens, stopwatch, phases=phases)
    assert minutes is not None, "one of three is given"
    return TimeBudget(60.0 * minutes, stopwatch)
