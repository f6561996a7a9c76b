"""float8 and MXFP8: the products of an independent computation, near fp32 under every layout, refused where sizes do not fit."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed import run_distributed
from tests.parallel.steps import PLAIN, Case, T, V, build, take_steps
from titanarch.checkpoint.train_state import ModelState
from titanarch.contract.layers import Linear
from titanarch.models.decoder import Decoder, DecoderConfig
from titanarch.parallel.config import Float8Config
from titanarch.parallel.float8 import apply_float8, chosen_linears, float8_notes, float8_problems
from titanarch.parallel.mesh import Degrees

E4M3_MAX = 448.0
LOSS_BOUND = 2e-2
"""Relative, over two large steps: a rounding to 3 bits of fraction is an error of up to 1/16 of a factor."""

ON = {"enable": True}
TP2 = {"tensor_parallel_degree": 2}
GATHERED = {**ON, "enable_fsdp_float8_all_gather": True}
CASES = {
    "fp32": Case(parallelism=TP2, n_steps=2),
    "tensorwise": Case(parallelism=TP2, float8=ON, n_steps=2),
    "gathered": Case(parallelism=TP2, float8=GATHERED, n_steps=2),
    "gathered, a scale at a time": Case(parallelism=TP2, float8={**GATHERED, "precompute_float8_dynamic_scale_for_fsdp": False}, n_steps=2),
    "mxfp8": Case(parallelism=TP2, float8={**ON, "recipe_name": "mxfp8"}, n_steps=2),
}


def meta_model(table: dict[str, Any] = PLAIN) -> Decoder:
    with torch.device("meta"):
        return Decoder(DecoderConfig.model_validate(table), V, T)


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """``x`` after a stay in e4m3 with one scale for whatever ``scale`` broadcasts over."""
    return (x * scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() / scale


def expected_product(recipe: str, x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of rounded factors, in float32."""
    factors = []
    for factor in (x, weight):
        if recipe == "mxfp8":
            blocks = factor.unflatten(-1, (-1, 32))
            exponent = torch.ceil(torch.log2(blocks.abs().amax(-1, keepdim=True) / E4M3_MAX))
            factors.append(rounded(blocks, torch.exp2(-exponent)).flatten(-2))
        elif recipe == "tensorwise":
            factors.append(rounded(factor, E4M3_MAX / factor.abs().max()))
        else:
            scale = E4M3_MAX / factor.abs().amax(-1, keepdim=True)
            factors.append(rounded(factor, torch.exp2(torch.floor(torch.log2(scale)))))
    return factors[0] @ factors[1].T


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp", "mxfp8"])
def test_products_are_those_of_rounded_factors(recipe: str) -> None:
    model = Decoder(DecoderConfig.model_validate(PLAIN), V, T)
    before = list(model.state_dict())
    apply_float8(model, Float8Config(enable=True, recipe_name=recipe, emulate=True, filter_fqns=("layers.1",)), "cpu")
    assert list(model.state_dict()) == before
    linear, other = model.get_submodule("layers.0.channel.up"), model.get_submodule("layers.1.channel.up")
    assert isinstance(linear, Linear)
    assert isinstance(other, Linear)
    assert other.multiply is None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32, 64, generator=generator)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(128, 64, generator=generator))
    y = linear(x)
    torch.testing.assert_close(y, expected_product(recipe, x.flatten(0, 1), linear.weight.detach()).view_as(y), rtol=1e-5, atol=1e-4)
    exact = x @ linear.weight.T
    assert 1e-3 < (y - exact).norm() / exact.norm() < 0.05
    y.square().sum().backward()
    gradient, exact_gradient = linear.weight.grad, (2 * exact).flatten(0, 1).T @ x.flatten(0, 1)
    assert gradient is not None
    assert (gradient - exact_gradient).norm() / exact_gradient.norm() < 0.1


def steps_and_weights() -> tuple[dict[str, list[float]], list[str], bool]:
    """Losses of each case; the classes of a checkpoint's local weights when they are gathered in float8; whether they load back."""
    losses = {name: take_steps(case).losses for name, case in CASES.items()}
    model, _ = build(CASES["gathered"])
    state = ModelState(model)
    saved = {name: value.detach().clone() for name, value in state.state_dict().items()}
    kinds = sorted({type(shard_of(value)).__name__ for value in saved.values()})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.0)
    state.load_state_dict(saved)
    is_back = all(torch.equal(shard_of(value), shard_of(saved[name])) for name, value in state.state_dict().items())
    dist.barrier()
    return losses, kinds, is_back


def shard_of(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def test_fsdp_and_tensor_parallelism_train_near_fp32() -> None:
    for losses, kinds, is_back in run_distributed(steps_and_weights, 4, timeout_seconds=290):
        for name, found in losses.items():
            assert found == pytest.approx(losses["fp32"], rel=LOSS_BOUND), name
            assert (found == losses["fp32"]) == (name == "fp32"), f"{name} changes nothing"
        assert losses["gathered"] == losses["gathered, a scale at a time"]
        assert kinds == ["Tensor"]
        assert is_back


def test_declared_linears_are_chosen() -> None:
    names = [name for name, *_ in chosen_linears(meta_model(), Float8Config(enable=True, filter_fqns=("wo", "layers.1")))]
    assert names == [f"layers.0.{child}" for child in ("mixer.wk", "mixer.wq", "mixer.wv", "channel.down", "channel.up")]


@pytest.mark.parametrize(
    ("table", "float8", "tp", "key", "text"),
    [
        (
            {"channel": {"kind": "mlp", "d_ff": 72}},
            {},
            1,
            "enable",
            "multiples of 16: layers.0.channel.down 64 x 72, layers.0.channel.up",
        ),
        ({}, {}, 8, "enable", "on each of 8 processes: layers.0.mixer.wo 64 x 8"),
        ({"d_model": 48}, {"recipe_name": "mxfp8"}, 1, "enable", "multiples of 32"),
        ({}, {"enable_fsdp_float8_all_gather": True, "recipe_name": "rowwise"}, 1, "enable_fsdp_float8_all_gather", "use 'tensorwise'"),
        ({}, {"filter_fqns": ["layers.0.mixer.wx"]}, 1, "filter_fqns", "did you mean 'layers.0.mixer.w"),
        ({}, {"filter_fqns": ["layers"]}, 1, "enable", "no Linear to apply it to"),
    ],
)
def test_what_does_not_fit_is_refused(table: dict[str, Any], float8: dict[str, Any], tp: int, key: str, text: str) -> None:
    config = Float8Config.model_validate({"enable": True, **float8})
    problems = list(float8_problems(meta_model({**PLAIN, **table}), config, Degrees(1, 1, 1, tp), seq_len=T, device_type="cpu"))
    found = {problem.key: problem.message for problem in problems}
    assert text in found[f"quantize.linear.float8.{key}"]


def test_a_filter_lets_what_does_not_fit_through() -> None:
    model = meta_model({**PLAIN, "channel": {"kind": "mlp", "d_ff": 72}})
    config = Float8Config(enable=True, filter_fqns=("channel",))
    assert not list(float8_problems(model, config, Degrees(1, 1), seq_len=T, device_type="cpu"))
    (problem,) = float8_problems(model, config, Degrees(1, 1), seq_len=24, device_type="cpu")
    assert problem.key == "training.seq_len"


def test_emulation_is_told() -> None:
    (note,) = float8_notes(Float8Config(enable=True), "cpu")
    assert "emulated" in note
    assert float8_notes(Float8Config(), "cpu") == ()
    assert math.isclose(E4M3_MAX, torch.finfo(torch.float8_e4m3fn).max)
