"""Isotropic and elephant activations: closed forms, what the notes' forms do, and half precision."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import titanarch.models.components  # noqa: F401 (registers all)
from tests.models.materialize import shape
from titanarch.config.errors import ConfigError
from titanarch.contract.channel import ACTIVATIONS, CHANNELS, Activation, ChannelMixer
from titanarch.models.elephant import normal_mean
from titanarch.parallel.check import why_not_divided

NOTES = "isotropic_as_in_the_notes"


def build(table: str | dict[str, object]) -> Activation:
    config = ACTIVATIONS.resolve(table)
    return ACTIVATIONS.of(config)(config)


def gaussian(*sizes: int, std: float = 1.0) -> Tensor:
    return std * torch.randn(*sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def near_linear(activation: Activation, n_units: int, std: float = 1.0) -> tuple[float, float]:
    """R^2 of the best multiple of the input, and the root mean square of the output."""
    h = gaussian(200, n_units, std=std)
    y = activation(h)
    rest = y - h * ((y * h).sum() / h.square().sum())
    return float(1 - rest.square().sum() / y.square().sum()), float(y.square().mean().sqrt())


@pytest.mark.parametrize("phi", ["offset", "tanh"])
def test_isotropic_is_its_closed_form(phi: str) -> None:
    """A group at a time, in plain numbers."""
    activation = build({"kind": "isotropic", "group": 4, "phi": phi, "offset": 0.6, "intrinsic": 0.3, "eps": 1e-6})
    h = gaussian(5, 12)
    for row, out in zip(h.tolist(), activation(h).tolist(), strict=True):
        for start in range(0, 12, 4):
            part = row[start : start + 4]
            r = math.sqrt(sum(v * v for v in part) / 4 + 0.09 + 1e-6)
            size = max(0.0, r - 0.6) if phi == "offset" else math.tanh(r)
            assert out[start : start + 4] == pytest.approx([v * size / r for v in part], rel=1e-12)


@pytest.mark.parametrize("table", ["isotropic", {"kind": "isotropic", "phi": "tanh", "intrinsic": 0.2}, NOTES], ids=str)
def test_gradients_by_differences(table: str | dict[str, object]) -> None:
    assert torch.autograd.gradcheck(build(table), (gaussian(3, 16).requires_grad_(),))


@pytest.mark.parametrize(("table", "n_units"), [({"kind": "isotropic", "group": 16}, 16), (NOTES, 24)], ids=str)
def test_it_turns_with_its_input(table: str | dict[str, object], n_units: int) -> None:
    h, (rotation, _) = gaussian(7, n_units), torch.linalg.qr(gaussian(n_units, n_units))
    activation = build(table)
    assert (activation(h @ rotation) - activation(h) @ rotation).abs().max() < 1e-12


def test_the_notes_form_is_all_but_linear_and_the_mended_one_is_not() -> None:
    r2, rms = near_linear(build(NOTES), 3072)
    assert r2 == pytest.approx(0.9998, abs=1e-4)
    assert rms == pytest.approx(0.018, abs=5e-4)
    h = gaussian(4, 3072)
    assert (build({"kind": NOTES, "phi": "relu"})(h) - h).abs().max() < 1e-12
    assert build(NOTES)(torch.zeros(2, 8)).isnan().all()
    r2, rms = near_linear(build("isotropic"), 3072, std=0.4)
    expected = mended_moments(std=0.4, offset=0.25)
    assert r2 == pytest.approx(expected[0], abs=2e-3)
    assert rms == pytest.approx(expected[1], rel=5e-3)
    assert expected[0] < 0.9


def mended_moments(*, std: float, offset: float) -> tuple[float, float]:
    """What ``near_linear`` finds over groups of 8 units, by the midpoint rule; 8 squares have the density q^3 e^(-q/2) / 96."""
    width, linear, square, inputs = 0.01, 0.0, 0.0, 0.0
    for i in range(6000):
        q = (i + 0.5) * width
        density = q**3 * math.exp(-q / 2) / 96 * width
        r = std * math.sqrt(q / 8)
        size = max(0.0, r - offset)
        linear, square, inputs = linear + density * r * size, square + density * size**2, inputs + density * r**2
    return linear**2 / (inputs * square), math.sqrt(square)


def slope(x: float, a: float, delta: float) -> float:
    power = abs(x / a) ** delta
    return -math.copysign(delta / abs(x) * power / (1 + power) ** 2, x)


@pytest.mark.parametrize(("a", "delta"), [(2.0, 8.0), (0.5, 4.0)])
def test_elephant_is_its_closed_form(a: float, delta: float) -> None:
    activation = build({"kind": "elephant", "a": a, "delta": delta})
    x = gaussian(200).requires_grad_()
    (grad,) = torch.autograd.grad(activation(x).sum(), x)
    assert activation(x).tolist() == pytest.approx([1 / (1 + abs(v / a) ** delta) for v in x.tolist()], rel=1e-12)
    assert grad.tolist() == pytest.approx([slope(v, a, delta) for v in x.tolist()], rel=1e-9, abs=1e-12)
    steepest = (delta**2 - 1) / (4 * a * delta) * ((delta + 1) / (delta - 1)) ** (1 / delta)
    dense = torch.linspace(0.5 * a, 1.5 * a, 20001, dtype=torch.float64).requires_grad_()
    (grads,) = torch.autograd.grad(activation(dense).sum(), dense)
    assert float(grads.abs().max()) == pytest.approx(steepest, rel=1e-6)


def test_elephant_s_mean_is_subtracted() -> None:
    assert normal_mean(2.0, 8.0) == pytest.approx(0.94, abs=5e-3)
    plain, less = build("elephant"), build({"kind": "elephant", "a": 0.8, "subtract_mean_at": 0.4})
    x = gaussian(400_000)
    assert float(plain(x).mean()) == pytest.approx(normal_mean(2.0, 8.0), abs=2e-3)
    assert float(plain(x).std()) == pytest.approx(0.17, abs=0.01)
    assert float(less(0.4 * x).mean()) == pytest.approx(0.0, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("table", ["elephant", "isotropic", {"kind": "isotropic", "phi": "tanh"}], ids=str)
def test_half_precision_has_no_nan(table: str | dict[str, object], dtype: torch.dtype) -> None:
    activation = build(table)
    h = torch.cat([torch.zeros(8), gaussian(48).float() * 30, torch.full((8,), 6e-8), torch.full((8,), 6e4)]).to(dtype).requires_grad_()
    y = activation(h)
    assert y.dtype is dtype
    y.sum().backward()
    assert h.grad is not None
    assert y.isfinite().all()
    assert h.grad.isfinite().all()
    exact = activation(h.detach().double())
    assert ((y.double() - exact).abs() / (1 + exact.abs())).max() < 0.01


def test_the_power_form_has_nan_gradients_in_half_precision() -> None:
    x = torch.tensor([10.0], dtype=torch.float16, requires_grad=True)
    (grad,) = torch.autograd.grad((1 / (1 + (x / 2).abs() ** 8)).sum(), x)
    assert grad.isnan().all()
    (grad,) = torch.autograd.grad(build("elephant")(x).sum(), x)
    assert float(grad) == pytest.approx(slope(10.0, 2.0, 8.0), rel=0.05, abs=6e-8)


def test_groups_must_be_whole_on_every_process() -> None:
    def channel(**table: object) -> ChannelMixer:
        config = CHANNELS.resolve({"kind": "mlp", **table})
        return CHANNELS.of(config)(config, shape(16), 0)

    with pytest.raises(ConfigError, match="44 hidden units are no multiple of 8"):
        channel(d_ff=44, activation="isotropic")
    assert why_not_divided(channel(d_ff=48, activation="isotropic"), 2) == ""
    assert "groups of 16 units together, and a process has 24 of 48" in why_not_divided(
        channel(d_ff=48, activation={"kind": "isotropic", "group": 16}), 2
    )
    assert "all units together" in why_not_divided(channel(d_ff=48, activation=NOTES), 2)
    mixed = build({"kind": "mixed", "activations": ["isotropic", "relu"]})
    assert mixed.unit_group == 16
    assert build({"kind": "mixed", "activations": ["relu", NOTES]}).unit_group is None


@pytest.mark.parametrize(
    "table",
    [
        {"kind": "isotropic", "group": 1},
        {"kind": "isotropic", "phi": "relu"},
        {"kind": "elephant", "a": 0.0},
        {"kind": "elephant", "delta": 1.0},
    ],
    ids=str,
)
def test_wrong_tables_are_refused(table: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ACTIVATIONS.resolve(table)
