"""Absolute positions against x-transformers and closed forms."""

import math

import pytest
import torch
from pydantic import ValidationError
from x_transformers.x_transformers import ScaledSinusoidalEmbedding

from tests.models.materialize import materialized, n_parameters, shape
from titanarch.config.errors import ConfigError
from titanarch.contract.position import ABSOLUTE_POSITIONS, AbsolutePosition
from titanarch.models import positions

D = 32
KINDS = [*ABSOLUTE_POSITIONS, {"kind": "ape_average", "base": "sinusoidal"}, {"kind": "ape_unit_variance", "base": "sinusoidal"}]


def build(table: str | dict[str, object], d_model: int = D) -> AbsolutePosition:
    config = ABSOLUTE_POSITIONS.resolve(table)
    component = ABSOLUTE_POSITIONS.of(config)
    module = materialized(lambda: component(config, shape(d_model)))
    assert n_parameters(module) == component.cost(config, shape(d_model)).parameters
    return module


def written_out(position: int, channel: int, theta: float = 10_000.0) -> float:
    angle = position * theta ** (-2 * (channel // 2) / D)
    return math.cos(angle) if channel % 2 else math.sin(angle)


def test_all_kinds_are_registered() -> None:
    assert "sinusoidal" in positions.__all__
    expected = {"none", "sinusoidal", "scaled_sinusoidal", "learned", "ape_average", "ape_sum_over_average", "ape_unit_variance"}
    assert set(ABSOLUTE_POSITIONS) == expected


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_trains_and_depends_on_the_position_alone(kind: str | dict[str, object]) -> None:
    module = build(kind)
    x = torch.randn(2, 5, D)
    position = torch.tensor([[0, 1, 2, 0, 1], [7, 3, 0, 15, 2]])
    out = module(x, position)
    assert out.shape == x.shape
    zero = module(torch.zeros_like(x), position)
    assert torch.equal(zero[0, :2], zero[0, 3:])
    assert torch.equal(zero[0, 2], zero[1, 4])
    if n_parameters(module):
        out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert module(x.bfloat16(), position).dtype == torch.bfloat16


def test_none_changes_nothing() -> None:
    x = torch.randn(1, 3, D)
    assert build("none")(x, torch.arange(3)[None]) is x


def test_sinusoid_is_the_paper_s_formula() -> None:
    position = torch.tensor([[0, 1, 2, 17, 4000]])
    out = build("sinusoidal")(torch.zeros(1, 5, D, dtype=torch.float64), position)
    expected = torch.tensor([[written_out(int(n), c) for c in range(D)] for n in position[0]], dtype=torch.float64)
    assert (out[0] - expected).abs().max() < 1e-10


def test_scaled_sinusoid_is_x_transformers_with_channels_in_pairs() -> None:
    module, reference = build("scaled_sinusoidal"), ScaledSinusoidalEmbedding(D)
    assert module.get_parameter("scale").item() == pytest.approx(reference.scale.item(), rel=1e-7)
    with torch.no_grad():
        module.get_parameter("scale").fill_(1.7)
        reference.scale.fill_(1.7)
    x = torch.randn(1, 12, D)
    halves = reference(x)
    interleaved = halves.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    assert (module(x, torch.arange(12)[None]) - (x + interleaved)).abs().max() < 1e-6


def test_initial_scale_is_a_key() -> None:
    assert build({"kind": "scaled_sinusoidal", "initial_scale": 1.0}).get_parameter("scale").item() == 1.0


def test_learned_adds_rows_of_the_table() -> None:
    module = build({"kind": "learned", "max_length": 40})
    assert module.max_length() == 40
    assert build("learned").max_length() == shape().seq_len
    table = module.get_parameter("table.weight")
    x, position = torch.randn(2, 3, D), torch.tensor([[39, 0, 5], [1, 1, 2]])
    one_hot = torch.nn.functional.one_hot(position, 40).float()
    assert (module(x, position) - (x + one_hot @ table)).abs().max() < 1e-6
    assert table.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("kind", ["learned", "ape_sum_over_average"])
def test_a_position_beyond_the_table_is_refused(kind: str) -> None:
    module = build(kind)
    with pytest.raises(ConfigError, match=r"learned positions end at 15.*max_length"):
        module(torch.zeros(1, 1, D), torch.tensor([[16]]))


@pytest.mark.parametrize("base", ["learned", "sinusoidal"])
@pytest.mark.parametrize(
    ("kind", "factor", "std"),
    [("ape_average", 0.5, 256**-0.5), ("ape_sum_over_average", 1.0, 256**-0.5), ("ape_unit_variance", 0.5, 1.0)],
)
def test_march_variants(kind: str, base: str, factor: float, std: float) -> None:
    config = ABSOLUTE_POSITIONS.resolve({"kind": kind, "base": base})
    module = materialized(lambda: ABSOLUTE_POSITIONS.of(config)(config, shape(256)))
    x, position = torch.randn(1, 16, 256), torch.arange(16)[None]
    P = module(torch.zeros_like(x), position) / factor
    assert (module(x, position) - factor * (x + P)).abs().max() < 1e-6
    assert P.square().mean().sqrt().item() == pytest.approx(std, rel=0.05 if base == "learned" else 1e-5)
    assert module.max_length() == (16 if base == "learned" else None)


def test_wrong_tables_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"d_model \(33\) is odd"):
        build("sinusoidal", 33)
    with pytest.raises(ConfigError, match=r"'ape_average': d_model \(33\) is odd"):
        build({"kind": "ape_average", "base": "sinusoidal"}, 33)
    for table in (
        {"kind": "learned", "max_length": 0},
        {"kind": "sinusoidal", "theta": 0.0},
        {"kind": "scaled_sinusoidal", "scale": 1.0},
        {"kind": "ape_average", "base": "alibi"},
        {"kind": "ape_average", "base": "sinusoidal", "max_length": 8},
    ):
        with pytest.raises(ValidationError):
            ABSOLUTE_POSITIONS.resolve(table)
