"""[lr_scheduler]: what the learning rate is multiplied by at each step, as a pure function of how far the run is.

With s the number of the step from 0, W warm-up steps and N steps in the run:

- warm-up: (s + 1) / W for s < W, so that no step is lost to a learning rate of 0;
- after it, p runs from 0 at step W towards 1 at step N, which would be the one after the last: p = (s - W) / (N - W);
- constant: 1. linear: 1 - p. cosine: (1 + cos(pi p)) / 2. wsd: 1, then decay over the last ``decay_ratio`` of the run, where
  p = (s - (1 - decay_ratio) N) / (decay_ratio N);
- ``min_lr_factor`` m makes any decay d into m + (1 - m) d.

So the last step of a linear decay to 0 is made at 1 / (N - W) of the peak. In budgets of tokens and minutes the elapsed
fraction stands for s / N; warm-up given as a fraction of minutes rises with the fraction, and its first step has a
learning rate of 0.
"""

from abc import ABC, abstractmethod
from math import cos, inf, pi, sqrt
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from titanarch.config.errors import ConfigError, Problem
from titanarch.config.registry import ComponentConfig, Registry
from titanarch.train.budget import Budget

Share = Annotated[float, Field(ge=0, le=1)]
DecayType = Literal["linear", "sqrt", "cosine"]


class SchedulerConfig(ComponentConfig):
    """[lr_scheduler]; ``kind`` picks the schedule."""

    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps over which the learning rate rises linearly")
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the run over which the learning rate rises linearly; in place of warmup_steps"
    )

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError("warmup_steps and warmup_fraction both give the warm-up: keep one")
        return self

    @property
    def budget_matters_from(self) -> float:
        """The elapsed fraction from which a longer budget changes the values; infinite where it never does."""
        return 0.0

    @property
    def depends_on_budget(self) -> bool:
        """Whether a longer run has other learning rates, so that an ended run cannot just go on."""
        return self.budget_matters_from <= 1


class Schedule(ABC):
    """The factor of the learning rate; what can be registered as a schedule."""

    Config: ClassVar[type[SchedulerConfig]]
    decays: ClassVar[bool] = True
    """Whether it needs to know when warm-up ends as a share of the run."""

    def __init__(self, config: SchedulerConfig, budget: Budget) -> None:
        """Raises ConfigError where the budget leaves the end of the warm-up open, or does not reach it."""
        self._warmup_steps = config.warmup_steps
        self._warmup_fraction = config.warmup_fraction
        if config.warmup_fraction and budget.total_steps is not None:
            self._warmup_steps, self._warmup_fraction = round(config.warmup_fraction * budget.total_steps), 0.0
        self._warmup_end = self._warmup_fraction
        if self._warmup_steps and self.decays:
            self._warmup_end = _share_of_steps(self._warmup_steps, budget)

    def factor(self, step: int, fraction: float) -> float:
        """What the learning rate of step number ``step``, from 0, is multiplied by.

        ``fraction``: the share of the budget spent before the step.
        """
        if step < self._warmup_steps:
            return (step + 1) / self._warmup_steps
        if fraction < self._warmup_fraction:
            return fraction / self._warmup_fraction
        return self._after_warmup(fraction)

    @abstractmethod
    def _after_warmup(self, fraction: float) -> float:
        """The factor once warm-up is over."""


SCHEDULES: Registry[Schedule] = Registry("schedule")
schedule = SCHEDULES.register


class ConstantConfig(SchedulerConfig):
    """The peak from the end of warm-up on."""

    @property
    def budget_matters_from(self) -> float:
        return 0.0 if self.warmup_fraction else inf


@schedule("constant")
class Constant(Schedule):
    Config = ConstantConfig
    decays = False

    def _after_warmup(self, fraction: float) -> float:
        return 1.0


class LinearConfig(SchedulerConfig):
    """A straight line from the peak to the floor at the end of the run."""

    min_lr_factor: Share = Field(0.0, description="the floor, as a share of the peak")


@schedule("linear")
class Linear(Schedule):
    Config = LinearConfig

    def __init__(self, config: LinearConfig, budget: Budget) -> None:
        super().__init__(config, budget)
        self._floor = config.min_lr_factor

    def _after_warmup(self, fraction: float) -> float:
        return _decayed("linear", _progress(fraction, self._warmup_end), self._floor)


class CosineConfig(SchedulerConfig):
    """Half a cosine from the peak to the floor at the end of the run (arXiv:1608.03983, without restarts)."""

    min_lr_factor: Share = Field(0.0, description="the floor, as a share of the peak")


@schedule("cosine")
class Cosine(Schedule):
    Config = CosineConfig

    def __init__(self, config: CosineConfig, budget: Budget) -> None:
        super().__init__(config, budget)
        self._floor = config.min_lr_factor

    def _after_warmup(self, fraction: float) -> float:
        return _decayed("cosine", _progress(fraction, self._warmup_end), self._floor)


class WSDConfig(SchedulerConfig):
    """Warm-up, stable, decay (arXiv:2404.06395)."""

    decay_ratio: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="share of the run, at its end, over which the rate decays")
    decay_type: DecayType = Field("linear", description="shape of the decay")
    min_lr_factor: Share = Field(0.0, description="the floor, as a share of the peak")

    @property
    def budget_matters_from(self) -> float:
        return 0.0 if self.warmup_fraction else 1 - self.decay_ratio


@schedule("wsd")
class WSD(Schedule):
    Config = WSDConfig

    def __init__(self, config: WSDConfig, budget: Budget) -> None:
        super().__init__(config, budget)
        self._decay_type: DecayType = config.decay_type
        self._decay_start = 1 - config.decay_ratio
        self._floor = config.min_lr_factor
        if self._warmup_end > self._decay_start + 1e-9:
            raise ConfigError(
                Problem(
                    f"warm-up takes {self._warmup_end:.3g} of the run and decay {config.decay_ratio:.3g}, more than the whole: shorten one",
                    key="lr_scheduler.decay_ratio",
                )
            )

    def _after_warmup(self, fraction: float) -> float:
        return _decayed(self._decay_type, _progress(fraction, self._decay_start), self._floor)


def build_schedule(config: SchedulerConfig, budget: Budget) -> Schedule:
    """The schedule that ``config`` configures, for a run of ``budget``. Raises ConfigError where the two do not fit."""
    return SCHEDULES.of(config)(config, budget)


def _share_of_steps(n_steps: int, budget: Budget) -> float:
    """What share of the budget ``n_steps`` are, which must be less than all."""
    share = budget.fraction_after(n_steps)
    if share is None:
        message = "nobody knows beforehand what share of this budget the steps will be: give warmup_fraction in place of warmup_steps"
        raise ConfigError(Problem(message, key="lr_scheduler.warmup_steps"))
    if share >= 1:
        message = f"warm-up takes {n_steps} steps and the run has {budget.total_steps}, so nothing is left for the decay: shorten it"
        raise ConfigError(Problem(message, key="lr_scheduler.warmup_steps"))
    return share


def _progress(fraction: float, start: float) -> float:
    """How far ``fraction`` is between ``start`` and 1."""
    return min(max((fraction - start) / (1 - start), 0.0), 1.0)


def _decayed(decay_type: DecayType, progress: float, floor: float) -> float:
    """From 1 at progress 0 to ``floor`` at progress 1."""
    if decay_type == "linear":
        decayed = 1 - progress
    elif decay_type == "sqrt":
        decayed = 1 - sqrt(progress)
    else:
        decayed = 0.5 * (1 + cos(pi * progress))
    return floor + (1 - floor) * decayed
