"""Norms against torch.nn and formulas in fp64."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tests.models.materialize import materialized, n_parameters
from titanarch.contract.norm import NORMS, Norm
from titanarch.models import norms

KINDS = ["none", "layernorm", "rmsnorm", {"kind": "layernorm", "bias": False}, {"kind": "rmsnorm", "gain": False}]


def build(table: str | dict[str, object], dim: int = 24) -> Norm:
    config = NORMS.resolve(table)
    component = NORMS.of(config)
    module = materialized(lambda: component(config, dim))
    assert n_parameters(module) == component.n_parameters(config, dim)
    return module


def randomized(module: Norm) -> Norm:
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


def test_all_kinds_are_registered() -> None:
    assert norms.RMSNormConfig.kind == "rmsnorm"
    assert set(NORMS) == {"layernorm", "rmsnorm", "none"}


@pytest.mark.parametrize(("bias", "eps"), [(True, 1e-5), (False, 1e-2)])
def test_layernorm(bias: bool, eps: float) -> None:
    module = randomized(build({"kind": "layernorm", "bias": bias, "eps": eps})).double()
    reference = nn.LayerNorm(24, eps=eps, bias=bias, dtype=torch.float64)
    reference.load_state_dict(module.state_dict())
    x = torch.randn(3, 5, 24, dtype=torch.float64) * 3 + 1
    assert (module(x) - reference(x)).abs().max() < 1e-12


@pytest.mark.parametrize(("gain", "eps"), [(True, 1e-5), (False, 1e-2)])
def test_rmsnorm(gain: bool, eps: float) -> None:
    module = randomized(build({"kind": "rmsnorm", "gain": gain, "eps": eps})).double()
    x = torch.randn(3, 5, 24, dtype=torch.float64) * 0.1
    expected = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (module.get_parameter("weight") if gain else 1)
    assert (module(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_starts_neutral_and_gradients_flow(kind: str | dict[str, object]) -> None:
    module = build(kind)
    x = torch.randn(2, 24, requires_grad=True)
    out = module(x)
    if kind == "none":
        assert out is x
    else:
        assert (out.square().mean(-1) - 1).abs().max() < 1e-3
        assert (nn.functional.layer_norm(out, (24,)) - nn.functional.layer_norm(x, (24,))).abs().max() < 1e-4
        (out * torch.randn(24)).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_statistics_of_low_precision_are_fp32(kind: str, parameters: torch.dtype) -> None:
    """Sums of 4,096 bf16 squares near 300 would be lost in bf16, where 256 + 1 is 256."""
    module = build(kind, 4096).to(parameters)
    x = (torch.randn(4, 4096) * 300 + 40).bfloat16()
    exact = build(kind, 4096).double()(x.double())
    out = module(x)
    assert out.dtype == torch.bfloat16
    assert ((out.double() - exact).abs() / exact.abs().clamp(min=0.5)).max() < 2**-7


@pytest.mark.parametrize(
    "table", [{"kind": "rmsnorm", "eps": 0.0}, {"kind": "layernorm", "gain": True}, {"kind": "none", "eps": 1e-5}], ids=str
)
def test_wrong_tables_are_refused(table: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        NORMS.resolve(table)
