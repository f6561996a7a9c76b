"""Distance biases against Bloom, MPT, T5, x-transformers and written-out formulas."""

import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import T5Config
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention
from x_transformers.x_transformers import AlibiPositionalBias, DynamicPositionBias

from tests.models.materialize import materialized, n_parameters, shape
from titanarch.contract.position import RELATIVE_POSITIONS, RelativePosition
from titanarch.contract.roles import VECTOR, roles_of
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.models.positions.t5 import bucket_starts

TABLES = ["alibi", "linear_cpb", "linear_cpb_large", "log_cpb", "fourier_cpb", "t5"]
CPB = ["linear_cpb", "linear_cpb_large", "log_cpb", "fourier_cpb"]


def build(table: str | dict[str, object], n_heads: int = 4, layer: int = 0, model: ModelShape | None = None) -> RelativePosition:
    config = RELATIVE_POSITIONS.resolve(table)
    component, model = RELATIVE_POSITIONS.of(config), model or shape()
    module = materialized(lambda: component(config, model, layer, n_heads, 8))
    assert n_parameters(module) == component.cost(config, model, layer, n_heads, 8).parameters
    return module


def bias(module: RelativePosition, n_distances: int, bidirectional: bool = False) -> Tensor:
    table: Tensor = module(n_distances, bidirectional, Carry.empty())[0]
    return table


def gathered(table_HN: Tensor, n_tokens: int) -> Tensor:
    """[H, T, T] of a bidirectional table: entry (i, j) is the bias of query i and key j."""
    index = torch.arange(n_tokens)
    return table_HN[:, index[:, None] - index + n_tokens - 1]


def test_every_scheme_says_whether_it_has_a_table() -> None:
    assert {kind for kind in RELATIVE_POSITIONS if RELATIVE_POSITIONS[kind].has_table} == set(TABLES)
    assert {kind for kind in RELATIVE_POSITIONS if RELATIVE_POSITIONS[kind].learned_table} == set(TABLES) - {"alibi"}
    with pytest.raises(NotImplementedError, match="no table"):
        bias(build("none"), 4)


@pytest.mark.parametrize("kind", TABLES)
def test_shape_dtype_and_prefix(kind: str) -> None:
    """A longer table starts with the shorter one, and the causal half of a bidirectional one is the causal one."""
    module = build(kind, n_heads=6)
    short, long, both = bias(module, 5), bias(module, 300), bias(module, 7, bidirectional=True)
    assert short.shape == (6, 5)
    assert long.shape == (6, 300)
    assert both.shape == (6, 13)
    assert {short.dtype, both.dtype} == {torch.float32}
    assert torch.equal(bias(module, 1), bias(module, 1))
    assert (long[:, :5] - short).abs().max() < 1e-6
    if kind != "t5":  # whose halves split the buckets
        assert (both[:, 6:] - bias(module, 7)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", TABLES)
def test_compiles_in_one_graph(kind: str) -> None:
    module = build(kind)
    compiled = torch.compile(lambda: module(20, False, Carry.empty())[0], backend="aot_eager", fullgraph=True)
    assert (compiled() - bias(module, 20)).abs().max() < 1e-6


@pytest.mark.parametrize("n_heads", [1, 4, 6, 8, 12, 20])
def test_alibi(n_heads: int) -> None:
    table = bias(build("alibi", n_heads), 40, bidirectional=True)
    reference = AlibiPositionalBias(n_heads)(40, 40)
    assert (gathered(table, 40) - reference).abs().max() < 1e-6
    # Bloom biases keys by slope * position, MPT by slope * (position - last): a constant a row away from ours.
    bloom = build_alibi_tensor(torch.ones(1, 40), n_heads, torch.float32)[:, 0]
    torch.testing.assert_close(bias(build("alibi", n_heads), 40), -bloom, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gathered(table, 40)[:, -1], build_mpt_alibi_tensor(n_heads, 40)[:, 0], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("kind", "log"), [("linear_cpb", False), ("log_cpb", True)])
@pytest.mark.parametrize("depth", [1, 3])
def test_cpb_is_the_dynamic_position_bias(kind: str, log: bool, depth: int) -> None:
    module = build({"kind": kind, "depth": depth}).double()
    reference = DynamicPositionBias(dim=256, heads=4, depth=depth, log_distance=log).double()
    for stage in reference.mlp[:-1]:
        stage[-1] = nn.ReLU()
    reference.load_state_dict(dict(zip(reference.state_dict(), module.state_dict().values(), strict=True)))
    # Called as it is, it makes its inputs in fp32: its layers are walked in fp64, then the whole is called in fp32.
    distance = torch.arange(-19.0, 20.0, dtype=torch.float64)
    x = (distance.sign() * (distance.abs() + 1).log() if log else distance)[:, None]
    for layer in reference.mlp:
        x = layer(x)
    assert (bias(module, 20, bidirectional=True) - x.t()).abs().max() < 1e-10
    as_called = reference.float()(20, 20)
    assert (gathered(bias(module.float(), 20, bidirectional=True), 20) - as_called).abs().max() < 1e-5
    if depth == 1:
        assert n_parameters(module) == 1540


def test_fourier_cpb() -> None:
    module = build("fourier_cpb").double()
    w_in, b_in, w_out, b_out = module.state_dict().values()
    distance = torch.arange(-19.0, 20.0, dtype=torch.float64)
    features = [f(distance * math.exp(-k * math.log(20_000.0) / 8)) for f in (torch.sin, torch.cos) for k in range(8)]
    hidden = (torch.stack(features, dim=-1) @ w_in.T + b_in).clamp(min=0)
    assert (bias(module, 20, bidirectional=True) - (hidden @ w_out.T + b_out).T).abs().max() < 1e-10
    assert n_parameters(module) == 16 * 256 + 256 + 256 * 4 + 4


@pytest.mark.parametrize("kind", ["linear_cpb", "linear_cpb_large"])
def test_distances_divided_by_the_training_length(kind: str) -> None:
    scaled, plain = build({"kind": kind, "distance_scale": "seq_len"}), build(kind)
    far = bias(scaled, 16 * 16 + 1)[:, :: shape().seq_len]
    assert (far - bias(plain, 17)).abs().max() < 1e-5


def test_log_of_scaled_distances() -> None:
    module = build({"kind": "log_cpb", "distance_scale": "seq_len", "hidden": 8}).double()
    w_in, b_in, w_out, b_out = module.state_dict().values()
    x = torch.log(1 + torch.arange(30.0, dtype=torch.float64) / 16)[:, None]
    assert (bias(module, 30) - ((x @ w_in.T + b_in).clamp(min=0) @ w_out.T + b_out).T).abs().max() < 1e-10


@pytest.mark.parametrize("kind", CPB)
def test_cpb_starts_as_pytorch_does_and_is_kept_from_decay_and_muon(kind: str) -> None:
    module = build({"kind": kind, "hidden": 4096})
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            bound = 1 / math.sqrt(linear.in_features)
            for p in (linear.weight, linear.bias):
                assert p.abs().max().item() <= bound
            assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert set(roles_of(module).values()) == {VECTOR}
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_large_has_a_bigger_network() -> None:
    assert n_parameters(build("linear_cpb_large")) == 1024 + 1024 + 1024 * 4 + 4


@pytest.mark.parametrize("kind", [*CPB, "t5"])
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    module = build(kind)
    weight = torch.randn(4, 2 * 200 - 1)
    (bias(module, 200, bidirectional=True) * weight).sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 20), (16, 256), (6, 64), (64, 1000), (32, 17)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5(n_buckets: int, max_distance: int, bidirectional: bool) -> None:
    module = build({"kind": "t5", "n_buckets": n_buckets, "max_distance": max_distance})
    config = T5Config(
        d_model=32,
        num_heads=4,
        is_decoder=not bidirectional,
        relative_attention_num_buckets=n_buckets,
        relative_attention_max_distance=max_distance,
    )
    reference = T5Attention(config, has_relative_attention_bias=True)
    with torch.no_grad():
        reference.relative_attention_bias.weight.copy_(module.get_parameter("table_HS").T)
    expected = reference.compute_bias(1200, 1200)[0]
    if bidirectional:
        assert torch.equal(gathered(bias(module, 1200, bidirectional=True), 1200), expected)
    else:
        assert torch.equal(bias(module, 1200), expected[:, -1].flip(1))


def test_t5_gradient_counts_the_distances_of_a_bucket() -> None:
    module = build("t5")
    bias(module, 500).sum().backward()
    gradient = module.get_parameter("table_HS").grad
    assert gradient is not None
    starts = [*bucket_starts(32, 128), 500]
    assert gradient[0].tolist() == [b - a for a, b in pairwise(starts)]


def test_t5_table_starts_as_in_t5() -> None:
    table = build({"kind": "t5", "n_buckets": 512, "max_distance": 1024}).get_parameter("table_HS")
    assert table.std().item() == pytest.approx(32**-0.5, rel=0.05)


def test_t5_shares_the_first_table_of_a_mixer_s_name() -> None:
    model = shape(layers=("local", "global", "local", "global"))
    modules = [build("t5", layer=layer, model=model) for layer in range(4)]
    assert [n_parameters(module) for module in modules] == [128, 128, 0, 0]
    carry, tables = Carry.empty(), []
    for module in modules:
        table, carry = module(50, False, carry)
        tables.append(table)
    assert tables[2] is tables[0]
    assert tables[3] is tables[1]
    assert modules[0].get_parameter("table_HS") is not modules[1].get_parameter("table_HS")
    apart = build({"kind": "t5", "shared": False}, layer=3, model=model)
    assert n_parameters(apart) == 128
    assert apart(50, False, Carry.empty())[1].values == {}


def test_flops_of_a_network_are_its_products_a_distance() -> None:
    config = RELATIVE_POSITIONS.resolve({"kind": "linear_cpb", "depth": 2})
    cost = RELATIVE_POSITIONS.of(config).cost(config, shape(), 0, 4, 8)
    assert cost.forward_flops_per_token == 2 * (256 + 256 * 256 + 256 * 4)


@pytest.mark.parametrize(
    "table",
    [
        {"kind": "alibi", "slope": 1.0},
        {"kind": "linear_cpb", "hidden": 0},
        {"kind": "log_cpb", "depth": 0},
        {"kind": "linear_cpb", "distance_scale": "max"},
        {"kind": "fourier_cpb", "theta": -1.0},
        {"kind": "fourier_cpb", "distance_scale": "seq_len"},
        {"kind": "t5", "n_buckets": 31},
        {"kind": "t5", "n_buckets": 2},
        {"kind": "t5", "max_distance": 16},
    ],
    ids=str,
)
def test_wrong_tables_are_refused(table: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RELATIVE_POSITIONS.resolve(table)
