"""Activations against transformers' and closed forms."""

import math

import pytest
import torch
from pydantic import ValidationError
from transformers.activations import ACT2FN

from titanarch.config.errors import ConfigError
from titanarch.contract.channel import ACTIVATIONS, Activation
from titanarch.models import activations


def build(table: str | dict[str, object]) -> Activation:
    config = ACTIVATIONS.resolve(table)
    return ACTIVATIONS.of(config)(config)


def test_all_kinds_are_registered() -> None:
    assert activations.GELUConfig.kind == "gelu"
    assert set(ACTIVATIONS) >= {"identity", "relu", "relu2", "gelu", "silu", "sigmoid", "mixed"}


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ("identity", "linear"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("gelu", "gelu"),
        ({"kind": "gelu", "approximate": "tanh"}, "gelu_new"),
        ("silu", "silu"),
        ("sigmoid", "sigmoid"),
    ],
    ids=str,
)
def test_each_is_transformers(table: str | dict[str, object], name: str) -> None:
    x = torch.randn(1000, dtype=torch.float64) * 3
    assert (build(table)(x) - ACT2FN[name](x)).abs().max() < 1e-12


def test_gelu_is_x_times_the_normal_distribution_function() -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    expected = [v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()]
    assert (build("gelu")(x) - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-12


def test_mixed_gives_units_their_activations_in_turn() -> None:
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    out = build({"kind": "mixed", "activations": ["relu", "silu", "identity"]})(x)
    for unit in range(12):
        part = [torch.relu, torch.nn.functional.silu, lambda v: v][unit % 3]
        assert torch.equal(out[..., unit], part(x[..., unit]))


def test_mixed_on_a_slice_of_units_is_the_slice_of_mixed() -> None:
    mixed, x = build({"kind": "mixed", "activations": ["relu", "sigmoid"]}), torch.randn(4, 16)
    assert torch.equal(mixed(x[:, 8:]), mixed(x)[:, 8:])


def test_wrong_tables_are_refused() -> None:
    with pytest.raises(ConfigError, match="7 hidden units on a process are no multiple of its 2"):
        build({"kind": "mixed", "activations": ["relu", "silu"]})(torch.zeros(7))
    for names, message in (
        (["relu"], "two or more"),
        (["relu", "swish"], "'swish' cannot"),
        (["relu", "mixed"], "'mixed' cannot"),
        (["relu", "rel"], "did you mean 'relu'"),
    ):
        with pytest.raises(ValidationError, match=message):
            ACTIVATIONS.resolve({"kind": "mixed", "activations": names})
    with pytest.raises(ValidationError):
        ACTIVATIONS.resolve({"kind": "gelu", "approximate": True})
