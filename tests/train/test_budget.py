"""Budgets by steps, tokens and minutes."""

import pytest

from titanarch.config.errors import ConfigError
from titanarch.data.phases import Phase, Phases
from titanarch.train.budget import Budget, StepBudget, Stopwatch, TimeBudget, TokenBudget, build_budget


class Clock:
    """A clock that stands still until told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def walk(budget: Budget, n_steps: int, tokens_per_step: int = 0) -> list[tuple[float, bool]]:
    budget.start(0, 0)
    found = [(budget.fraction, budget.done)]
    for step in range(1, n_steps + 1):
        budget.advance(step, step * tokens_per_step)
        found.append((budget.fraction, budget.done))
    return found


def steps_of(n_tokens: int) -> Phases:
    """Steps of one row of so many tokens."""
    return Phases.of([Phase(n_tokens, 1, 1)])


def test_steps() -> None:
    budget = build_budget(steps=4, tokens=None, minutes=None, phases=steps_of(7))
    assert isinstance(budget, StepBudget)
    assert walk(budget, 5, 7) == [(0.0, False), (0.25, False), (0.5, False), (0.75, False), (1.0, True), (1.0, True)]
    assert budget.total_steps == 4
    assert budget.fraction_after(3) == 0.75


def test_tokens_round_up_to_whole_steps() -> None:
    budget = build_budget(steps=None, tokens=100, minutes=None, phases=steps_of(30))
    assert isinstance(budget, TokenBudget)
    assert walk(budget, 4, 30) == [(0.0, False), (0.3, False), (0.6, False), (0.9, False), (1.0, True)]
    assert budget.total_steps == 4
    assert budget.fraction_after(2) == 0.6
    changing = build_budget(steps=None, tokens=100, minutes=None, phases=Phases.of([Phase(5, 2, 2, 3), Phase(10, 3, 3)]))
    assert changing.total_steps == 3 + 3
    assert [changing.fraction_after(n) for n in (2, 4, 6)] == [0.2, 0.6, 1.2]


def test_minutes_count_training_time_over_all_starts() -> None:
    clock = Clock()
    budget = build_budget(steps=None, tokens=None, minutes=1.0, phases=steps_of(7), stopwatch=Stopwatch(clock))
    assert isinstance(budget, TimeBudget)
    assert budget.total_steps is None
    assert budget.fraction_after(3) is None
    budget.start(0, 0)
    clock.now += 15
    budget.advance(1, 7)
    assert (budget.fraction, budget.done) == (0.25, False)
    with budget.stopwatch.paused():
        clock.now += 500  # validation
    clock.now += 15
    budget.advance(2, 14)
    assert budget.fraction == 0.5
    clock.now += 3  # part of a step that the checkpoint does not hold still took time
    saved = budget.state_dict()
    assert saved == {"elapsed_seconds": 33.0}

    clock.now += 9999  # the run was down
    resumed = build_budget(steps=None, tokens=None, minutes=1.0, phases=steps_of(7), stopwatch=Stopwatch(clock))
    resumed.load_state_dict(saved)
    resumed.start(2, 14)
    assert resumed.fraction == pytest.approx(33 / 60)
    clock.now += 27
    resumed.advance(3, 21)
    assert (resumed.fraction, resumed.done) == (1.0, True)


def test_a_state_may_be_loaded_while_the_stopwatch_runs() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock)
    stopwatch.start()
    clock.now += 5
    stopwatch.load_state_dict({"elapsed_seconds": 100.0})
    clock.now += 2
    stopwatch.start()
    assert stopwatch.seconds == 102.0
    stopwatch.stop()
    clock.now += 2
    assert stopwatch.seconds == 102.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"one of steps, tokens and minutes says, and none of them is given"),
        ({"steps": 3, "minutes": 2.0}, r"steps = 3 and minutes = 2.0 is given"),
        ({"steps": 0}, r"\[training\] steps: 0 is no length"),
        ({"minutes": float("nan")}, r"\[training\] minutes: nan is no length"),
    ],
)
def test_wrong_budgets(given: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_budget(**{"steps": None, "tokens": None, "minutes": None, **given}, phases=steps_of(7))  # type: ignore[arg-type]
