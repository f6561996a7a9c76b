"""Rotations against transformers' Llama, GPT-NeoX and scaling functions, and rotary_embedding_torch."""

import math

import pytest
import torch
from pydantic import ValidationError
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from tests.models.materialize import materialized, n_parameters, shape
from titanarch.config.errors import ConfigError
from titanarch.contract.position import RELATIVE_POSITIONS
from titanarch.models.positions.rotary import Rotary

HF_SCALINGS = [
    ({"kind": "none"}, {"rope_type": "default"}),
    ({"kind": "interpolation", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    (
        {"kind": "yarn", "factor": 8.0, "original_length": 512},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512},
    ),
    (
        {"kind": "yarn", "factor": 2.0, "original_length": 64, "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.3},
        {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "attention_factor": 1.3,
        },
    ),
    (
        {"kind": "llama3", "factor": 32.0, "original_length": 8192},
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    ),
]


def build(head_dim: int = 64, **table: object) -> Rotary:
    config = RELATIVE_POSITIONS.resolve({"kind": "rotary", **table})
    module = materialized(lambda: RELATIVE_POSITIONS.of(config)(config, shape(), 0, 4, head_dim))
    assert isinstance(module, Rotary)
    assert n_parameters(module) == RELATIVE_POSITIONS.of(config).cost(config, shape(), 0, 4, head_dim).parameters == 0
    return module


def heads(head_dim: int = 64, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of 4 heads, keys of 2, and positions that start anew in the middle."""
    position = torch.tensor([[0, 1, 2, 3, 0, 1], [5, 900, 4095, 17, 0, 131]])
    return torch.randn(2, 6, 4, head_dim, dtype=dtype), torch.randn(2, 6, 2, head_dim, dtype=dtype), position


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(("scaling", "hf"), HF_SCALINGS, ids=lambda value: str(value.get("kind", "")) if isinstance(value, dict) else "")
def test_llama(theta: float, scaling: dict[str, object], hf: dict[str, object]) -> None:
    module = build(theta=theta, scaling=scaling)
    parameters = {**hf, "rope_theta": theta}
    length = hf.get("original_max_position_embeddings", 4096)
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=length, rope_parameters=parameters)
    reference = modeling_llama.LlamaRotaryEmbedding(config)
    ours = module.frequencies(torch.float32, torch.device("cpu"))
    assert (ours / reference.inv_freq - 1).abs().max() < 1e-6
    # The last bit of a frequency moves far angles by 1e-4: hand over ours, so that the rotation itself is compared.
    reference.inv_freq = ours
    q, k, position = heads()
    expected = modeling_llama.apply_rotary_pos_emb(q, k, *reference(q, position), unsqueeze_dim=2)
    for got, want in zip(module.rotate(q, k, position), expected, strict=True):
        assert (got - want).abs().max() < 1e-6


def test_without_scaling_the_frequencies_are_llama_s_to_the_bit() -> None:
    reference = modeling_llama.LlamaRotaryEmbedding(LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64))
    assert torch.equal(build().frequencies(torch.float32, torch.device("cpu")), reference.inv_freq)


def test_partial_is_gpt_neox() -> None:
    parameters = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
    config = GPTNeoXConfig(hidden_size=256, num_attention_heads=4, rope_parameters=parameters)
    reference = modeling_gpt_neox.GPTNeoXRotaryEmbedding(config)
    q, k, position = heads()
    expected = modeling_gpt_neox.apply_rotary_pos_emb(q, k, *reference(q, position), unsqueeze_dim=2)
    got = build(fraction=0.25).rotate(q, k, position)
    for ours, want in zip(got, expected, strict=True):
        assert (ours - want).abs().max() < 1e-6
    assert torch.equal(got[0][..., 16:], q[..., 16:])


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_interleaved_is_rotary_embedding_torch(fraction: float) -> None:
    reference = RotaryEmbedding(dim=int(64 * fraction))
    q, k, _ = heads()
    expected = [reference.rotate_queries_or_keys(x, seq_dim=-3) for x in (q, k)]
    got = build(layout="interleaved", fraction=fraction).rotate(q, k, torch.arange(6).expand(2, 6))
    for ours, want in zip(got, expected, strict=True):
        assert (ours - want).abs().max() < 1e-6


@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
def test_rotation_is_complex_multiplication_in_double(layout: str) -> None:
    q, k, position = heads(8, torch.float64)
    got, _ = build(8, layout=layout).rotate(q, k, position)
    pairs = q.unflatten(-1, (2, 4)).transpose(-1, -2) if layout == "half_split" else q.unflatten(-1, (4, 2))
    frequency = torch.tensor([10_000.0 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * position[..., None, None] * frequency)
    parts = torch.view_as_real(turned)
    expected = parts.transpose(-1, -2).flatten(-2) if layout == "half_split" else parts.flatten(-2)
    assert (got - expected).abs().max() < 1e-10


@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
def test_logits_depend_on_the_distance_alone(layout: str) -> None:
    module = build(layout=layout, fraction=0.5)
    q, k = (torch.randn(1, 1, 1, 64, dtype=torch.float64) for _ in range(2))

    def logit(query: int, key: int) -> float:
        turned_q, _ = module.rotate(q, k, torch.tensor([[query]]))
        _, turned_k = module.rotate(q, k, torch.tensor([[key]]))
        return float((turned_q * turned_k).sum())

    assert logit(12, 5) == pytest.approx(logit(1007, 1000), abs=1e-9)
    assert abs(logit(12, 5) - logit(12, 6)) > 1e-4


def test_low_precision_is_rotated_in_fp32_and_comes_back() -> None:
    q, k, position = heads()
    module = build()
    for got, exact in zip(module.rotate(q.bfloat16(), k.bfloat16(), position), module.rotate(q, k, position), strict=True):
        assert got.dtype == torch.bfloat16
        assert ((got.float() - exact).abs() / exact.abs().clamp(min=1)).max() < 2**-6
    rounded = module.rotate(q.bfloat16().float(), k, position)[0].bfloat16()
    assert torch.equal(module.rotate(q.bfloat16(), k.bfloat16(), position)[0], rounded)


def test_gradient_is_the_inverse_rotation() -> None:
    q, k, position = heads(8, torch.float64)
    q.requires_grad_()
    module = build(8)
    turned, _ = module.rotate(q, k, position)
    (turned * turned.detach()).sum().backward()
    assert q.grad is not None
    assert (q.grad - q.detach()).abs().max() < 1e-10


def test_compiles_in_one_graph() -> None:
    module = build(scaling={"kind": "llama3"})
    q, k, position = heads()
    compiled = torch.compile(module.rotate, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(q, k, position), module.rotate(q, k, position), strict=True):
        assert (got - want).abs().max() < 1e-6


def test_yarn_scales_both_sides_by_its_factor() -> None:
    assert build(scaling={"kind": "yarn", "factor": 8.0, "original_length": 512}).attention_factor == 0.1 * math.log(8.0) + 1


@pytest.mark.parametrize(("head_dim", "fraction"), [(7, 1.0), (64, 0.3), (6, 0.5), (64, 0.001)])
def test_channels_that_do_not_pair_are_refused(head_dim: int, fraction: float) -> None:
    with pytest.raises(ConfigError, match=rf"fraction \({fraction}\) of head_dim \({head_dim}\)"):
        build(head_dim, fraction=fraction)


@pytest.mark.parametrize(
    "table",
    [
        {"theta": 0.0},
        {"theta": -5.0},
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"layout": "neox"},
        {"scaling": "linear"},
        {"scaling": "interpolation"},
        {"scaling": {"kind": "interpolation", "factor": 0.5}},
        {"scaling": {"kind": "yarn", "factor": 2.0}},
        {"scaling": {"kind": "yarn", "factor": 2.0, "original_length": 8, "beta_fast": 1.0, "beta_slow": 2.0}},
        {"scaling": {"kind": "llama3", "high_freq_factor": 1.0}},
        {"scaling": {"kind": "none", "factor": 2.0}},
    ],
    ids=str,
)
def test_wrong_tables_are_refused(table: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        build(**table)
