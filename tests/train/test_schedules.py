"""Schedules against torch's schedulers and closed forms."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from titanarch.config.errors import ConfigError
from titanarch.data.phases import Phase, Phases
from titanarch.train.budget import Budget, StepBudget, Stopwatch, TimeBudget, TokenBudget
from titanarch.train.schedules import SCHEDULES, ConstantConfig, CosineConfig, LinearConfig, SchedulerConfig, WSDConfig, build_schedule

N_STEPS, WARMUP, FLOOR = 50, 8, 0.1


def steps(n_steps: int = N_STEPS) -> Budget:
    return StepBudget(n_steps, Stopwatch())


def factors(config: SchedulerConfig, n_steps: int = N_STEPS) -> list[float]:
    schedule = build_schedule(config, steps(n_steps))
    return [schedule.factor(step, step / n_steps) for step in range(n_steps)]


def torch_factors(decay: str | None) -> list[float]:
    """torch's schedulers one after another, on a learning rate of 1."""
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    # LinearLR reaches its end after total_iters steps, so the value (s + 1) / W at s = W - 1 needs W - 1 of them.
    warmup = LinearLR(sgd, start_factor=1 / WARMUP, end_factor=1.0, total_iters=WARMUP - 1)
    rest: LRScheduler = LinearLR(sgd, start_factor=1.0, end_factor=1.0, total_iters=1)
    if decay == "linear":
        rest = LinearLR(sgd, start_factor=1.0, end_factor=FLOOR, total_iters=N_STEPS - WARMUP)
    elif decay == "cosine":
        rest = CosineAnnealingLR(sgd, T_max=N_STEPS - WARMUP, eta_min=FLOOR)
    both = SequentialLR(sgd, [warmup, rest], milestones=[WARMUP])
    found = []
    for _ in range(N_STEPS):
        found.append(sgd.param_groups[0]["lr"])
        sgd.step()
        both.step()
    return found


@pytest.mark.parametrize(
    ("config", "decay"),
    [
        (ConstantConfig(warmup_steps=WARMUP), None),
        (LinearConfig(warmup_steps=WARMUP, min_lr_factor=FLOOR), "linear"),
        (CosineConfig(warmup_steps=WARMUP, min_lr_factor=FLOOR), "cosine"),
    ],
)
def test_against_torch(config: SchedulerConfig, decay: str | None) -> None:
    assert factors(config) == pytest.approx(torch_factors(decay), abs=1e-12)


@pytest.mark.parametrize("decay_type", ["linear", "sqrt", "cosine"])
@pytest.mark.parametrize("floor", [0.0, FLOOR])
def test_wsd_closed_form(decay_type: Any, floor: float) -> None:
    shape = {"linear": lambda p: 1 - p, "sqrt": lambda p: 1 - math.sqrt(p), "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2}[decay_type]
    expected = []
    for s in range(N_STEPS):
        p = max(s - 40, 0) / 10  # the last fifth of 50 steps
        expected.append((s + 1) / WARMUP if s < WARMUP else floor + (1 - floor) * shape(p))
    found = factors(WSDConfig(warmup_steps=WARMUP, decay_ratio=0.2, decay_type=decay_type, min_lr_factor=floor))
    assert found == pytest.approx(expected, abs=1e-7)


def test_first_and_last_step() -> None:
    """The values that the documentation states."""
    linear = factors(LinearConfig(warmup_steps=WARMUP))
    assert linear[0] == 1 / WARMUP
    assert linear[WARMUP - 1] == linear[WARMUP] == 1.0
    assert linear[-1] == pytest.approx(1 / (N_STEPS - WARMUP))
    assert factors(CosineConfig())[0] == 1.0
    assert build_schedule(CosineConfig(min_lr_factor=FLOOR), steps()).factor(N_STEPS, 1.0) == pytest.approx(FLOOR)
    assert build_schedule(LinearConfig(), steps()).factor(N_STEPS + 3, 1.06) == 0.0, "past the end, the floor"


@pytest.mark.parametrize("config", [LinearConfig, CosineConfig, WSDConfig, ConstantConfig])
def test_warmup_fraction_is_warmup_steps(config: type[SchedulerConfig]) -> None:
    assert factors(config(warmup_fraction=WARMUP / N_STEPS)) == factors(config(warmup_steps=WARMUP))


def steps_of(n_tokens: int) -> Phases:
    return Phases.of([Phase(n_tokens, 1, 1)])


@pytest.mark.parametrize("config", [LinearConfig(warmup_steps=4), CosineConfig(warmup_steps=4), WSDConfig(warmup_fraction=0.08)])
def test_token_budget_follows_the_elapsed_fraction(config: SchedulerConfig) -> None:
    """50 steps of 20 tokens are 1,000 tokens; 990 tokens take 50 steps too, and the last one overshoots."""
    by_steps = factors(config)
    exact = build_schedule(config, TokenBudget(1000, Stopwatch(), phases=steps_of(20)))
    assert [exact.factor(s, 20 * s / 1000) for s in range(N_STEPS)] == pytest.approx(by_steps, abs=1e-12)
    short = TokenBudget(990, Stopwatch(), phases=steps_of(20))
    assert short.total_steps == N_STEPS
    if isinstance(config, LinearConfig):
        linear = build_schedule(config, short)
        assert linear.factor(30, 600 / 990) == pytest.approx((990 - 600) / (990 - 80))


def test_minutes_need_a_fraction() -> None:
    minutes = TimeBudget(60.0, Stopwatch())
    for config in (LinearConfig(warmup_steps=3), CosineConfig(warmup_steps=3), WSDConfig(warmup_steps=3)):
        with pytest.raises(ConfigError, match=r"warmup_steps: .*give warmup_fraction"):
            build_schedule(config, minutes)
    assert build_schedule(ConstantConfig(warmup_steps=4), minutes).factor(1, 0.9) == 0.5
    linear = build_schedule(LinearConfig(warmup_fraction=0.2), minutes)
    found = [linear.factor(step, fraction) for step, fraction in enumerate((0.0, 0.1, 0.2, 0.6, 1.0))]
    assert found == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])


def test_warmup_must_leave_room() -> None:
    with pytest.raises(ConfigError, match=r"warmup_steps: warm-up takes 50 steps and the run has 50"):
        build_schedule(CosineConfig(warmup_steps=50), steps())
    with pytest.raises(ConfigError, match=r"decay_ratio: warm-up takes 0.6 of the run and decay 0.5"):
        build_schedule(WSDConfig(warmup_steps=30, decay_ratio=0.5), steps())
    build_schedule(WSDConfig(warmup_steps=40, decay_ratio=0.2), steps())
    assert factors(ConstantConfig(warmup_steps=100))[-1] == 0.5, "a constant schedule needs no end"
    with pytest.raises(ValidationError, match="keep one"):
        LinearConfig(warmup_steps=3, warmup_fraction=0.1)


@pytest.mark.parametrize(
    "config",
    [
        ConstantConfig(warmup_steps=WARMUP),
        ConstantConfig(warmup_fraction=0.2),
        LinearConfig(warmup_steps=WARMUP),
        CosineConfig(warmup_steps=WARMUP),
        WSDConfig(warmup_steps=WARMUP, decay_ratio=0.2),
        WSDConfig(warmup_fraction=0.2, decay_ratio=0.2),
    ],
)
def test_when_the_budget_matters(config: SchedulerConfig) -> None:
    """Doubling the steps changes some value exactly where the schedule says that it depends on them."""
    short, long = factors(config, N_STEPS), factors(config, 2 * N_STEPS)[:N_STEPS]
    assert (short != long) == config.depends_on_budget
    unchanged = min(N_STEPS, int(min(config.budget_matters_from, 1.0) * N_STEPS))
    assert short[:unchanged] == long[:unchanged]


def test_tables_by_kind() -> None:
    table = {"kind": "wsd", "warmup_steps": 200, "decay_ratio": 0.1, "decay_type": "sqrt", "min_lr_factor": 0.1}
    assert SCHEDULES.resolve(table) == WSDConfig(warmup_steps=200, decay_ratio=0.1, decay_type="sqrt", min_lr_factor=0.1)
    assert SCHEDULES.resolve("constant") == ConstantConfig()
    with pytest.raises(Exception, match="decay_ratio"):
        SCHEDULES.resolve({"kind": "cosine", "decay_ratio": 0.1})
