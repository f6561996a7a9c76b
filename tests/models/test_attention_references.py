"""Mixers by softmax against implementations by other hands: weights copied, outputs and all gradients, in fp64."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

import titanarch.models.components  # noqa: F401 (registers all)
from tests.models.materialize import shape
from titanarch.contract.mixer import MIXERS, SequenceMixer
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.side_channels import Carry

transformers = pytest.importorskip("transformers", reason="the extra 'reference' is not installed")

B, T, D, H, K = 2, 12, 32, 4, 8
LAYER = 2

Get = Callable[[str], Tensor]
"""A parameter of theirs, or its gradient, by name."""


def angles(n_channels: int, *, doubled: bool = True) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, n_channels] as transformers hands them to attention; half as many unless ``doubled``."""
    frequency = 10_000.0 ** (-torch.arange(0, n_channels, 2, dtype=torch.float64) / n_channels)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency
    angle = (torch.cat((angle, angle), -1) if doubled else angle).expand(B, T, -1)
    return angle.cos(), angle.sin()


def mask(window: int = T) -> Tensor:
    distance = torch.arange(T)[:, None] - torch.arange(T)
    return torch.zeros(1, 1, T, T, dtype=torch.float64).masked_fill((distance < 0) | (distance >= window), -torch.inf)


def build(kind: str, **options: object) -> SequenceMixer:
    config = MIXERS.resolve({"kind": kind, "n_heads": H, "position": "rotary", **options})
    mixer = MIXERS.of(config)(config, shape(D, T, ("mixer",) * 4), LAYER)
    assert isinstance(mixer, SequenceMixer)
    return mixer.double()


def assert_equal(
    ours: SequenceMixer, theirs: nn.Module, run: Callable[[Tensor], Tensor], parts: Mapping[str, Callable[[Get], Tensor]]
) -> None:
    """Outputs and gradients of the input and of every parameter within 1e-6 of the largest element.

    ``parts``: each parameter of ours as a linear function of theirs, which is then that of its gradient too.
    """
    torch.manual_seed(0)
    theirs.double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    given = dict(theirs.named_parameters())
    assert parts.keys() == {name for name, _ in ours.named_parameters()}
    for name, part in parts.items():
        target = ours.get_parameter(name)
        value = part(lambda source: given[source].detach())
        assert value.shape == target.shape, name
        target.data = value.clone()
    x, dy = torch.randn(2, B, T, D, dtype=torch.float64)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_ours, _ = ours(x_ours, SequenceInfo.whole(B, T), Carry.empty())
    y_theirs = run(x_theirs)
    y_ours.backward(dy)
    y_theirs.backward(dy)
    found = {"output": y_ours, "input": x_ours.grad} | {name: p.grad for name, p in ours.named_parameters()}

    def gradient(source: str) -> Tensor:
        grad = given[source].grad
        assert grad is not None, source
        return grad

    assert x_theirs.grad is not None
    expected = {"output": y_theirs, "input": x_theirs.grad} | {name: part(gradient) for name, part in parts.items()}
    for name, value in expected.items():
        largest = float(value.detach().abs().max())
        assert largest > 1e-6, f"{name} is zero, so it proves nothing"
        mine = found[name]
        assert mine is not None, f"{name} has no gradient"
        assert float((mine - value).detach().abs().max()) <= 1e-6 * largest, name


def same(name: str) -> Callable[[Get], Tensor]:
    return lambda get: get(name)


@pytest.mark.parametrize("n_kv_heads", [H, 2])
def test_differential_attention_is_that_of_diff_llama(n_kv_heads: int) -> None:
    """It pairs head i with i + H, and ours lie side by side."""
    config = transformers.DiffLlamaConfig(
        hidden_size=D, num_attention_heads=2 * H, num_key_value_heads=2 * n_kv_heads, rms_norm_eps=1e-5, attn_implementation="sdpa"
    )
    theirs = transformers.models.diffllama.modeling_diffllama.DiffLlamaAttention(config, LAYER)

    def paired(name: str, n_heads: int) -> Callable[[Get], Tensor]:
        return lambda get: get(name).unflatten(0, (2, n_heads, -1)).transpose(0, 1).flatten(0, 2)

    parts = {
        "wq.weight": paired("q_proj.weight", H),
        "wk.weight": paired("k_proj.weight", n_kv_heads),
        "wv.weight": paired("v_proj.weight", n_kv_heads),
        "wo.weight": same("o_proj.weight"),
        **{f"lambdas.{name}_K": same(f"lambda_{name}") for name in ("q1", "k1", "q2", "k2")},
    }
    ours = build("diff_attention", n_kv_heads=n_kv_heads)
    assert_equal(ours, theirs, lambda x: theirs(x, angles(D // (2 * H)), mask())[0], parts)


class DenseDiffV2(nn.Module):
    """Version 2 by the formula, with every map written out: heads 2 i and 2 i + 1 of the queries, group i G // H of keys."""

    def __init__(self, n_kv_heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, n * K, bias=False) for n in (2 * H, n_kv_heads, n_kv_heads))
        self.weigh, self.o = nn.Linear(D, H, bias=False), nn.Linear(H * K, D, bias=False)
        self.n_kv_heads = n_kv_heads

    def turned(self, x: Tensor) -> Tensor:
        """Interleaved pairs as complex numbers."""
        cos, sin = angles(K, doubled=False)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(cos, sin)[:, :, None]).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, K)) for linear in (self.q, self.k, self.v))
        q, k, weight = self.turned(q), self.turned(k), torch.sigmoid(self.weigh(x))
        heads = []
        for i in range(H):
            g = i * self.n_kv_heads // H
            maps = [torch.softmax(q[:, :, 2 * i + m] @ k[:, :, g].mT / K**0.5 + mask()[0], -1) for m in range(2)]
            heads.append((maps[0] - weight[:, :, i, None] * maps[1]) @ v[:, :, g])
        out: Tensor = self.o(torch.cat(heads, -1))
        return out


@pytest.mark.parametrize("n_kv_heads", [H, 2, 1])
def test_differential_attention_2_is_its_formula(n_kv_heads: int) -> None:
    theirs = DenseDiffV2(n_kv_heads)
    names = {"wq": "q", "wk": "k", "wv": "v", "w_lambda": "weigh", "wo": "o"}
    ours = build("diff_attention_v2", n_kv_heads=n_kv_heads, position={"kind": "rotary", "layout": "interleaved"})
    assert_equal(ours, theirs, theirs, {f"{mine}.weight": same(f"{their}.weight") for mine, their in names.items()})


@pytest.mark.parametrize("q_rank", [None, 20])
def test_latent_attention_is_that_of_deepseek_v3(q_rank: int | None) -> None:
    N, P, V, R = 8, 4, 6, 24
    config = transformers.DeepseekV3Config(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=H, q_lora_rank=q_rank, kv_lora_rank=R, qk_nope_head_dim=N,
        qk_rope_head_dim=P, v_head_dim=V, rope_interleave=True, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention(config, LAYER)

    def up(get: Get) -> Tensor:
        return get("kv_b_proj.weight").unflatten(0, (H, N + V))

    queries = {"wq.weight": same("q_proj.weight")}
    if q_rank:
        names = {"wq_down.weight": "q_a_proj.weight", "q_gain_Q": "q_a_layernorm.weight", "wq_up.weight": "q_b_proj.weight"}
        queries = {mine: same(their) for mine, their in names.items()}
    parts = {
        **queries,
        "wkv_down.weight": lambda get: get("kv_a_proj_with_mqa.weight")[:R],
        "wk_turned.weight": lambda get: get("kv_a_proj_with_mqa.weight")[R:],
        "kv_gain_R": same("kv_a_layernorm.weight"),
        "wk_up.weight": lambda get: up(get)[:, :N].flatten(0, 1),
        "wv_up.weight": lambda get: up(get)[:, N:].flatten(0, 1),
        "wo.weight": same("o_proj.weight"),
    }
    ours = build("mla", q_rank=q_rank, kv_rank=R, rotary_dim=P, value_dim=V, position={"kind": "rotary", "layout": "interleaved"})
    assert_equal(ours, theirs, lambda x: theirs(x, angles(P), mask())[0], parts)


def letters() -> dict[str, Callable[[Get], Tensor]]:
    return {f"w{letter}.weight": same(f"{letter}_proj.weight") for letter in "qkvo"}


def test_gated_attention_is_that_of_qwen3_next() -> None:
    config = transformers.Qwen3NextConfig(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=2, head_dim=K, rms_norm_eps=1e-6, attn_implementation="sdpa"
    )
    theirs = transformers.models.qwen3_next.modeling_qwen3_next.Qwen3NextAttention(config, LAYER)
    for name in ("q_norm", "k_norm"):  # theirs multiplies by 1 + weight, in float32
        setattr(theirs, name, nn.RMSNorm(K, eps=1e-6))

    def half(number: int) -> Callable[[Get], Tensor]:
        return lambda get: get("q_proj.weight").unflatten(0, (H, 2, K))[:, number].flatten(0, 1)

    gains = {"q_gain_K": same("q_norm.weight"), "k_gain_K": same("k_norm.weight")}
    parts = {**letters(), **gains, "wq.weight": half(0), "wg.weight": half(1)}
    position = {"kind": "rotary", "fraction": 0.25}
    ours = build("attention", n_kv_heads=2, qk_norm=True, output_gate=True, position=position)
    assert_equal(ours, theirs, lambda x: theirs(x, angles(K // 4), mask())[0], parts)


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_with_sinks_is_that_of_gpt_oss(layer: int) -> None:
    """Layers with a window and without one take turns."""
    config = transformers.GptOssConfig(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=2, head_dim=K, num_hidden_layers=2, sliding_window=5,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.models.gpt_oss.modeling_gpt_oss.GptOssAttention(config, layer)
    window = theirs.sliding_window
    assert (window is None) == (layer == 1)
    biases = {f"w{letter}.bias": same(f"{letter}_proj.bias") for letter in "qvo"}
    parts = {**letters(), **biases, "wk.bias": same("k_proj.bias"), "head.sinks_H": same("sinks")}
    ours = build("attention", n_kv_heads=2, sinks=True, qkv_bias=True, out_bias=True, window=window)
    assert_equal(ours, theirs, lambda x: theirs(x, angles(K, doubled=False), mask(window or T))[0], parts)
