"""Which steps are made: what becomes of a step whose loss or gradient is not finite, or whose gradient is far larger than usual.

The loop does

    norm = clipper.clip(divide_by=scaler.scale)
    if guard.admits(step, loss, norm):
        optimizers.step()

and calls ``guard.check()`` when it logs and before it saves.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from titanarch.config.section import FREE, Section
from titanarch.train.gradients import LossScaler

MOST_UNCHECKED_STEPS = 100
"""How many steps the guard leaves unread on an accelerator if nobody calls ``check``."""
HISTORY_STEPS = 50
"""How many steps' norms are kept for reports."""
LEAST_DEVIATION = 0.01
"""Of log norms: below it a window of nearly equal norms would call a rise of some percent a spike."""
NORMAL_MAD = 0.6744897501960817
"""The median absolute deviation of a normal distribution of deviation 1: the 3/4 quantile."""

Action = Literal["stop", "skip", "roll_back"]


class BadGradientsConfig(Section):
    """[bad_gradients]: steps whose loss or gradient is not finite, or whose gradient norm is far above those before it.

    stop: the run ends. skip: the update is not made. roll_back: the run goes back to its newest checkpoint, and on with
    the rows after those of the bad step.
    """

    nonfinite: Action = Field("stop", description="what becomes of a step whose loss or gradient is not finite", json_schema_extra=FREE)
    spike: Action | Literal["none"] = Field(
        "none", description="what becomes of a step whose gradient norm is a spike; none: it is made", json_schema_extra=FREE
    )
    spike_deviations: Annotated[float, Field(gt=0)] = Field(
        6.0, description="a spike's log norm is above the window's median by more than so many deviations (1.48 times the median one)"
    )
    spike_window: Annotated[int, Field(ge=8)] = Field(
        128, description="norms that a spike is measured by, those of the last so many steps made; before there are as many, none is one"
    )
    max_skips: Annotated[int, Field(gt=0)] = Field(
        100, description="steps skipped in a row at which the run stops, for then its weights are beyond repair", json_schema_extra=FREE
    )
    max_roll_backs: Annotated[int, Field(gt=0)] = Field(
        3, description="roll-backs of the whole run; at the next one it stops", json_schema_extra=FREE
    )
    report: bool = Field(True, description="write reports/step-N.json about each such step", json_schema_extra=FREE)


@dataclass(frozen=True)
class BadStep:
    """A step that is not made, or should not have been.

    ``loss``: this process's part of it. ``norm``: of the gradient, alike on all processes, as ``threshold``, above which
    a norm is a spike (inf: none is). ``action``: what becomes of the step. ``is_late``: the update was made, since nothing
    had waited for the accelerator. ``is_shared``: all processes see it; else the part of the loss is bad here alone.
    """

    step: int
    loss: float
    norm: float
    threshold: float
    action: Action
    is_late: bool = False

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    @property
    def is_shared(self) -> bool:
        return not math.isfinite(self.norm) or self.norm > self.threshold

    @property
    def kind(self) -> Literal["nonfinite", "spike"]:
        return "spike" if self.is_finite else "nonfinite"

    def __str__(self) -> str:
        if self.is_finite:
            return f"step {self.step}: the gradient norm {self.norm:g} is a spike, above {self.threshold:g}"
        return f"step {self.step}: the loss is {self.loss} and the gradient norm {self.norm}"


class BadGradientError(RuntimeError):
    """Training cannot go on, for its loss or gradient; ``bad`` is the step at which."""

    def __init__(self, bad: BadStep, advice: str) -> None:
        super().__init__(f"{bad}; {advice}")
        self.bad = bad


class SpikeDetector:
    """Norms far above those of the steps before, by the median of their logarithms and the median deviation from it.

    Both are unmoved by some outliers, and the logarithm makes the rule one of ratios. Only steps that were made are in
    the window, so a run whose norms rise for good is skipped until it stops.
    """

    def __init__(self, deviations: float, window: int) -> None:
        """``deviations``: of a normal distribution. ``window``: a count of steps."""
        self.deviations = deviations
        self.log_norms: deque[float] = deque(maxlen=window)

    @property
    def threshold(self) -> float:
        """The largest norm that is no spike; inf while the window is not full."""
        if len(self.log_norms) < (self.log_norms.maxlen or 0):
            return math.inf
        median = statistics.median(self.log_norms)
        deviation = statistics.median(abs(log_norm - median) for log_norm in self.log_norms) / NORMAL_MAD
        return math.exp(median + self.deviations * max(deviation, LEAST_DEVIATION))

    def add(self, norm: float) -> None:
        """A step of this norm was made."""
        self.log_norms.append(math.log(max(norm, torch.finfo(torch.float32).tiny)))


class GradientGuard:
    """Decides whether a step may be made, from the norm of the gradients, which all processes share: they decide alike.

    Where both policies are ``stop`` (or spikes are ``none``), nothing on an accelerator waits: the step is made, and the
    numbers are read by ``check``: when the loop logs, before it saves (so no checkpoint holds spoiled weights), and after
    100 steps at the latest. ``skip`` and ``roll_back`` need the norm before the step, so the host waits for the
    accelerator once a step; a spike costs no wait beside. On the CPU the norm is there anyhow.

    Overflows of float16 under a scale above 1 are skipped and counted by the scaler under every policy, and cost the same
    wait. ``bad``: what the last step was not made for, None of one that was made, or that the scaler skipped.
    """

    def __init__(self, config: BadGradientsConfig, scaler: LossScaler) -> None:
        self.config = config
        self.skipped = 0
        self.roll_backs = 0
        self.bad: BadStep | None = None
        self.history: deque[tuple[int, float]] = deque(maxlen=HISTORY_STEPS)
        """Number and norm of the last steps, oldest first."""
        self._spikes = SpikeDetector(config.spike_deviations, config.spike_window)
        self._scaler = scaler
        self._in_a_row = 0
        self._reads_late = config.nonfinite == "stop" and config.spike in ("stop", "none") and not scaler.enabled
        self._unchecked: list[tuple[int, Tensor, Tensor]] = []

    def admits(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """Whether the optimizer may make step number ``step``; ``loss`` and ``norm``: scalars. Raises BadGradientError."""
        self.bad = None
        if self._reads_late and norm.device.type != "cpu":
            self._unchecked.append((step, loss.detach(), norm))
            if len(self._unchecked) >= MOST_UNCHECKED_STEPS:
                self.check()
            return True
        number = norm.item()
        if self._scaler.update(finite=math.isfinite(number)):
            return False
        # The part of the loss is this process's own: it may end the run, but not decide what others do not hear of.
        bad = self._judged(step, loss.item() if self.config.nonfinite == "stop" else number, number)
        if bad is None:
            return True
        self.bad = bad
        if bad.action == "stop":
            raise BadGradientError(bad, _ADVICE[bad.kind])
        if bad.action == "roll_back":
            self._count_roll_back(bad)
        else:
            self._count_skip(bad)
        return False

    def check(self) -> None:
        """Read what has not been read yet; raises BadGradientError, naming the first bad step."""
        if not self._unchecked:
            return
        unchecked, self._unchecked = self._unchecked, []
        losses = torch.stack([loss.float() for _, loss, _ in unchecked])
        norms = torch.stack([norm for _, _, norm in unchecked])
        for (step, _, _), (loss, norm) in zip(unchecked, torch.stack([losses, norms], dim=1).tolist(), strict=True):
            bad = self._judged(step, loss, norm, is_late=True)
            if bad is not None:
                raise BadGradientError(bad, _ADVICE[bad.kind])

    def _judged(self, step: int, loss: float, norm: float, *, is_late: bool = False) -> BadStep | None:
        """What is wrong with a step, None where nothing is: then its norm joins the window."""
        self.history.append((step, norm))
        spike = self.config.spike
        threshold = math.inf if spike == "none" else self._spikes.threshold
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return BadStep(step, loss, norm, threshold, self.config.nonfinite, is_late)
        if spike != "none" and norm > threshold:
            return BadStep(step, loss, norm, threshold, spike, is_late)
        self._spikes.add(norm)
        self._in_a_row = 0
        return None

    def _count_skip(self, bad: BadStep) -> None:
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self.config.max_skips:
            raise BadGradientError(
                bad,
                f"{self._in_a_row} steps in a row were skipped (bad_gradients.max_skips), so skipping helps no more: "
                "resume from an earlier checkpoint with a lower optimizer.lr or training.max_norm",
            )

    def _count_roll_back(self, bad: BadStep) -> None:
        self.roll_backs += 1
        if self.roll_backs > self.config.max_roll_backs:
            raise BadGradientError(
                bad,
                f"the run was rolled back {self.config.max_roll_backs} times already (bad_gradients.max_roll_backs): its data or its "
                "optimizer.lr are at fault",
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "roll_backs": self.roll_backs,
            "log_norms": list(self._spikes.log_norms),
            "history": [[step, norm if math.isfinite(norm) else str(norm)] for step, norm in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]
        self.roll_backs = state["roll_backs"]
        self._in_a_row = state["in_a_row"]
        self._unchecked = []
        self._spikes.log_norms.clear()
        self._spikes.log_norms.extend(state["log_norms"])
        self.history.clear()
        self.history.extend((step, float(norm)) for step, norm in state["history"])


_ADVICE = {
    "nonfinite": "lower optimizer.lr or training.max_norm, raise lr_scheduler.warmup_steps, or skip such steps with "
    "bad_gradients.nonfinite = 'skip'",
    "spike": "raise bad_gradients.spike_deviations, or skip such steps with bad_gradients.spike = 'skip'",
}
