"""The guard on one process: what is a bad step, and what becomes of it."""

import json
import math
import statistics

import pytest
import torch

from titanarch.train.gradients import LossScaler
from titanarch.train.guard import BadGradientError, BadGradientsConfig, GradientGuard, SpikeDetector

GOOD, BAD = torch.tensor(1.0), torch.tensor(math.nan)


def guard_of(scaler: LossScaler | None = None, **keys: object) -> GradientGuard:
    return GradientGuard(BadGradientsConfig.model_validate(keys), scaler or LossScaler(enabled=False))


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_stop_raises_before_the_step(loss: float, norm: float) -> None:
    guard = guard_of()
    assert guard.admits(6, GOOD, torch.tensor(2.0))
    with pytest.raises(BadGradientError, match=rf"step 7: the loss is {loss} and the gradient norm {norm}") as caught:
        guard.admits(7, torch.tensor(loss), torch.tensor(norm))
    assert caught.value.bad.is_shared == (not math.isfinite(norm))
    assert guard.history[0] == (6, 2.0)


def test_skip_counts_and_gives_up_in_the_end() -> None:
    guard = guard_of(nonfinite="skip", max_skips=5)
    assert [guard.admits(step, GOOD, norm) for step, norm in enumerate((GOOD, BAD, BAD, GOOD))] == [True, False, False, True]
    assert guard.skipped == 2
    for step in range(4):
        assert not guard.admits(step, GOOD, BAD)
    again = guard_of(nonfinite="skip", max_skips=5)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict(), allow_nan=False)))
    assert again.skipped == 6
    assert str(again.history) == str(guard.history)
    with pytest.raises(BadGradientError, match="5 steps in a row"):
        again.admits(9, GOOD, BAD)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_overflow_of_float16_is_the_scalers(policy: str) -> None:
    """Sixteen halvings bring the scale to 1; what is not finite then is the model's."""
    scaler = LossScaler(enabled=True)
    guard, bad = guard_of(scaler, nonfinite=policy), torch.tensor(math.inf)
    assert guard.admits(0, GOOD, GOOD)
    for step in range(16):
        assert not guard.admits(step, GOOD, bad)
        assert guard.bad is None
    assert (scaler.scale, scaler.overflows, guard.skipped) == (1.0, 16, 0)
    if policy == "stop":
        with pytest.raises(BadGradientError, match="step 17"):
            guard.admits(17, GOOD, bad)
    else:
        assert not guard.admits(17, GOOD, bad)
        assert guard.skipped == 1


class OnDevice:
    """Stands for a scalar on an accelerator: anything but keeping it is a wait."""

    device = torch.device("cuda")

    def __init__(self, value: float) -> None:
        self.value = value

    def detach(self) -> "OnDevice":
        return self


def late(guard: GradientGuard, norms: list[float]) -> None:
    """Norms that stay unread on an accelerator, and then arrive."""
    for step, norm in enumerate(norms):
        assert guard.admits(step, OnDevice(5.0), OnDevice(norm))  # type: ignore[arg-type]
    guard._unchecked = [(s, torch.tensor(loss.value), torch.tensor(norm.value)) for s, loss, norm in guard._unchecked]  # type: ignore[attr-defined]


def test_stop_reads_nothing_on_an_accelerator() -> None:
    guard = guard_of()
    late(guard, [1.0, 2.0, math.nan, math.nan])
    with pytest.raises(BadGradientError, match=r"step 2: the loss is 5\.0 and the gradient norm nan") as caught:
        guard.check()
    assert caught.value.bad.is_late
    guard.check()


def test_a_spike_that_stops_is_found_late_on_an_accelerator() -> None:
    guard = guard_of(spike="stop", spike_window=8)
    late(guard, [1.0, 1.1] * 4 + [1.0, 9.0, 1.0])
    with pytest.raises(BadGradientError, match="step 9: the gradient norm 9 is a spike, above") as caught:
        guard.check()
    assert caught.value.bad.is_late
    assert caught.value.bad.is_shared


def test_the_threshold_is_the_median_and_its_deviations() -> None:
    """Against the formula in other words: the standard deviation of a normal distribution is its median deviation / 0.6745."""
    generator = torch.Generator().manual_seed(0)
    norms = torch.randn(64, generator=generator).mul(0.3).exp()
    detector = SpikeDetector(5.0, 64)
    for norm in norms[:-1].tolist():
        detector.add(norm)
        assert detector.threshold == math.inf
    detector.add(norms[-1].item())
    logs = norms.double().log().tolist()
    middle = statistics.median(logs)
    deviation = statistics.median(sorted(abs(x - middle) for x in logs)) * 1.482602218505602
    assert detector.threshold == pytest.approx(math.exp(middle + 5.0 * deviation), rel=1e-9)
    flat = SpikeDetector(5.0, 8)
    for _ in range(8):
        flat.add(2.0)
    assert flat.threshold == pytest.approx(2.0 * math.exp(0.05))


def test_spikes_are_skipped_and_do_not_join_the_window() -> None:
    norms = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.1, 50.0, 1.0, 40.0, 1.0]
    whole, first = guard_of(spike="skip", spike_window=8), guard_of(spike="skip", spike_window=8)
    made = [whole.admits(step, GOOD, torch.tensor(norm)) for step, norm in enumerate(norms)]
    assert [step for step, is_made in enumerate(made) if not is_made] == [8, 10]
    assert max(whole._spikes.log_norms) < math.log(2.0)
    for step, norm in enumerate(norms[:9]):
        first.admits(step, GOOD, torch.tensor(norm))
    assert first.bad is not None
    assert (first.bad.step, first.bad.norm, first.bad.kind) == (8, 50.0, "spike")
    second = guard_of(spike="skip", spike_window=8)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.admits(step, GOOD, torch.tensor(norm)) for step, norm in enumerate(norms) if step > 8] == [True, False, True]
    assert second.state_dict() == whole.state_dict()


def test_roll_backs_are_counted() -> None:
    guard = guard_of(nonfinite="roll_back", max_roll_backs=2)
    for step in (3, 4):
        assert not guard.admits(step, GOOD, BAD)
        assert guard.bad is not None
        assert guard.bad.action == "roll_back"
    with pytest.raises(BadGradientError, match=r"rolled back 2 times already .*max_roll_backs"):
        guard.admits(5, GOOD, BAD)
