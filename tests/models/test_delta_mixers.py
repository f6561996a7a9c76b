"""Gated DeltaNet, Kimi Delta Attention and RWKV-7 against other hands; documents, decoding and bad sizes."""

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

import titanarch.models.components  # noqa: F401 (registers all)
from tests.models.materialize import materialized, shape
from titanarch.config.errors import ConfigError
from titanarch.contract.channel import CHANNELS
from titanarch.contract.mixer import MIXERS, SequenceMixer
from titanarch.contract.roles import VECTOR, roles_of
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.side_channels import Carry
from titanarch.models.decoder import Decoder, DecoderConfig

B, T, D, H = 2, 21, 32, 4
NAMES = ("gated_delta_net", "kda", "rwkv7")


class InFloat64:
    """torch as a module sees it, but for float32, which is float64: the references compute in float32 whatever they are given."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


def drawn(name: str, layer: int = 0, **options: Any) -> SequenceMixer:
    """A mixer in float64 with random parameters, so that nothing is zero."""
    layers = (name, name)
    mixer = MIXERS[name](MIXERS[name].Config(n_heads=H, **options), shape(D, T, layers), layer).double()
    randomize(mixer)
    assert isinstance(mixer, SequenceMixer)
    return mixer


def randomize(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))


def inputs() -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def assert_layers_agree(mixer: SequenceMixer, theirs: nn.Module, copied: dict[str, Tensor]) -> None:
    """Outputs, and gradients of the input and of all weights; ``copied``: what of theirs each of ours was written to, by our name."""
    x, weights = inputs().requires_grad_(), inputs() + 1
    y, _ = mixer(x, SequenceInfo.whole(B, T), Carry.empty())
    y_theirs = theirs(x)
    assert_close(y, y_theirs, 1e-6)
    parameters = dict(mixer.named_parameters())
    assert copied.keys() == parameters.keys()
    ours = torch.autograd.grad((y * weights).sum(), [x, *parameters.values()])
    grad_x, *grads = torch.autograd.grad((y_theirs * weights).sum(), [x, *copied.values()])
    assert_close(ours[0], grad_x, 1e-6)
    for name, found, expected in zip(parameters, ours[1:], grads, strict=True):
        assert found.shape == expected.shape, name
        assert_close(found, expected, 1e-6)


def test_gated_delta_net_equals_qwen3_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two value heads a key head. The weights of theirs are made of ours, so that gradients come back to ours."""
    monkeypatch.setattr(qwen, "torch", InFloat64())
    monkeypatch.setattr(qwen, "torch_chunk_gated_delta_rule", inspect.unwrap(qwen.torch_recurrent_gated_delta_rule))
    monkeypatch.setattr(qwen, "causal_conv1d_fn", inspect.unwrap(qwen.causal_conv1d_fn))
    G, K, V = 2, 8, 12
    mixer = drawn("gated_delta_net", n_key_heads=G, head_dim=K, expand_v=1.5)
    config = qwen.Qwen3NextConfig(
        hidden_size=D, linear_num_value_heads=H, linear_num_key_heads=G, linear_key_head_dim=K, linear_value_head_dim=V,
        num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = qwen.Qwen3NextGatedDeltaNet(config, 0).double()
    p = {name: value.detach().clone().requires_grad_() for name, value in mixer.named_parameters()}
    grouped = [p[f"{name}.weight"].view(G, -1, D) for name in ("wq", "wk", "wv", "wg")]
    made = {
        "in_proj_qkvz.weight": torch.cat(grouped, 1).flatten(0, 1),
        "in_proj_ba.weight": torch.cat([p[f"{name}.weight"].view(G, -1, D) for name in ("wb", "wa")], 1).flatten(0, 1),
        "conv1d.weight": torch.cat([p[f"conv_{name}.weight_CW"] for name in "qkv"])[:, None],
        "dt_bias": p["head.dt_bias"],
        "A_log": p["head.a_log_H"],
        "norm.weight": p["norm_V"],
        "out_proj.weight": p["wo.weight"],
    }
    assert made.keys() == dict(theirs.named_parameters()).keys()
    assert_layers_agree(mixer, Functional(theirs, made), p)


def test_kda_equals_kimi_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kimi, "torch", InFloat64())
    recurrent = inspect.unwrap(kimi.recurrent_kimi_delta_attention)
    monkeypatch.setattr(kimi, "chunk_kimi_delta_attention", recurrent)
    monkeypatch.setattr(kimi, "causal_conv1d_fn", inspect.unwrap(kimi.causal_conv1d_fn))
    mixer = drawn("kda")
    config = kimi.KimiLinearConfig(
        hidden_size=D, linear_num_heads=H, linear_head_dim=D // H, num_hidden_layers=1, mlp_layer_types=["dense"]
    )
    theirs = kimi.KimiLinearDeltaAttention(config, 0).double()
    p = {name: value.detach().clone().requires_grad_() for name, value in mixer.named_parameters()}
    renamed = {
        "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "forget_gate.f_a_proj": "wa1", "forget_gate.f_b_proj": "wa2", "b_proj": "wb",
        "g_a_proj": "wg1", "g_b_proj": "wg2", "o_proj": "wo",
    }  # fmt: skip
    made = {
        **{f"{name}.weight": p[f"{ours}.weight"] for name, ours in renamed.items()},
        "conv1d.weight": torch.cat([p[f"conv_{name}.weight_CW"] for name in "qkv"])[:, None],
        "forget_gate.dt_bias": p["head.dt_bias"].flatten(),
        "forget_gate.A_log": p["head.a_log_H"].view(1, 1, H, 1),
        "o_norm.weight": p["norm_K"],
    }
    assert made.keys() == dict(theirs.named_parameters()).keys()
    assert_layers_agree(mixer, Functional(theirs, made), p)


class Functional(nn.Module):
    """A module run with given tensors in place of its parameters."""

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.module, self.tensors = module, tensors

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.module, self.tensors, (x,))


class TimeMixByToken(nn.Module):
    """RWKV-7's equations for one token after another, from the paper, with the state [V, K] kept by hand."""

    def __init__(self, p: dict[str, Tensor], v_first: Tensor | None) -> None:
        super().__init__()
        self.p, self.v_first = p, v_first

    def forward(self, x_BTD: Tensor) -> Tensor:
        p, K = self.p, D // H
        S = x_BTD.new_zeros(B, H, K, K)
        before, outputs = torch.zeros_like(x_BTD[:, 0]), []
        for t in range(T):
            x = x_BTD[:, t]
            r_, w_, k_, v_, a_, g_ = (x + (before - x) * mu for mu in p["shift_SD"])
            r, k, v = r_ @ p["wr.weight"].T, k_ @ p["wk.weight"].T, v_ @ p["wv.weight"].T
            w = torch.exp(-math.exp(-0.5) * torch.sigmoid(p["w0_D"] + torch.tanh(w_ @ p["w1.weight"].T) @ p["w2.weight"].T))
            a = torch.sigmoid(p["a0_D"] + a_ @ p["a1.weight"].T @ p["a2.weight"].T)
            g = torch.sigmoid(g_ @ p["g1.weight"].T) @ p["g2.weight"].T
            if self.v_first is not None:
                nu = torch.sigmoid(p["v2.bias"] + v_ @ p["v1.weight"].T @ p["v2.weight"].T)
                v = v + (self.v_first[:, t] - v) * nu
            kappa = (k * p["k_k_D"]).view(B, H, K)
            kappa = kappa / kappa.norm(dim=-1, keepdim=True)
            k = k * (1 + (a - 1) * p["k_a_D"])
            r, w, k, v, a = (z.view(B, H, K) for z in (r, w, k, v, a))
            S = S * w[:, :, None] - torch.einsum("bhvk,bhk,bhj->bhvj", S, kappa, a * kappa) + torch.einsum("bhv,bhk->bhvk", v, k)
            y = torch.einsum("bhvk,bhk->bhv", S, r).flatten(1)
            y = F.group_norm(y, H, p["gain_D"], p["bias_D"], eps=1e-5 * K).view(B, H, K)
            y = y + (r * k * p["r_k_D"].view(H, K)).sum(-1, keepdim=True) * v
            outputs.append((y.flatten(1) * g) @ p["wo.weight"].T)
            before = x
        return torch.stack(outputs, 1)


@pytest.mark.parametrize("layer", [0, 1])
def test_rwkv7_equals_its_equations_token_by_token(layer: int) -> None:
    mixer = drawn("rwkv7", layer, decay_rank=6, gate_rank=5)
    p = {name: value.detach().clone().requires_grad_() for name, value in mixer.named_parameters()}
    by_token = {name.removeprefix("head.").replace("_HK", "_D"): v.flatten() if "_HK" in name else v for name, v in p.items()}
    v_first = None if layer == 0 else inputs().flip(1)
    carry = Carry.empty() if v_first is None else Carry.empty().with_value("v_first.rwkv7", v_first)
    mixer.forward = lambda x, seq, _, forward=mixer.forward: forward(x, seq, carry)
    assert_layers_agree(mixer, TimeMixByToken(by_token, v_first), p)


def test_rwkv7_decays_may_have_a_learning_rate_of_their_own() -> None:
    """Of all parameters only w_0; it still takes no weight decay."""
    mixers = [
        MIXERS["rwkv7"](MIXERS["rwkv7"].Config(n_heads=H, **options), shape(D, T, ("rwkv7",)), 0)
        for options in ({}, {"decay_lr_group": "slow"})
    ]
    usual, own = (roles_of(mixer) for mixer in mixers)
    assert {name for name in own if own[name] != usual[name]} == {"head.w0_HK"}
    assert own["head.w0_HK"] == VECTOR.with_lr_group("slow")
    assert {role.lr_group for role in usual.values()} == {"default"}


def test_rwkv7_passes_the_first_layers_values_on() -> None:
    first = drawn("rwkv7")
    _, carry = first(inputs(), SequenceInfo.whole(B, T), Carry.empty())
    x = inputs()
    shifted = x + (F.pad(x[:, :-1], (0, 0, 1, 0)) - x) * first.shift_SD[3]
    torch.testing.assert_close(carry.values["v_first.rwkv7"], shifted @ first.wv.weight.T)


def test_the_channel_mix_is_its_formula() -> None:
    channel = CHANNELS["rwkv"](CHANNELS["rwkv"].Config(), shape(D, T), 0).double()
    randomize(channel)
    x = inputs()
    shifted = x + (F.pad(x[:, :-1], (0, 0, 1, 0)) - x) * channel.shift_D
    expected = torch.relu(shifted @ channel.up.weight.T) ** 2 @ channel.down.weight.T
    torch.testing.assert_close(channel(x, SequenceInfo.whole(B, T)), expected)
    assert channel.up.weight.shape == (4 * D, D)


def model_of(name: str) -> Decoder:
    table = {"n_layers": 2, "d_model": D, "n_heads": H, "layers": [name], "channel": "rwkv", "vocab_size": 61}
    model = Decoder(DecoderConfig.model_validate(table), vocab_size=61, seq_len=T).double()
    randomize(model)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_decoding_by_step_equals_the_whole_forward(name: str) -> None:
    model = model_of(name)
    tokens = torch.randint(61, (B, T), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, states = model.logits(tokens, SequenceInfo.whole(B, T)), model.initial_state(B)
        for index in range(T):
            logits, states = model.step(tokens[:, index : index + 1], index, states)
            torch.testing.assert_close(logits, expected[:, index], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_documents_of_a_row_do_not_mix(name: str) -> None:
    model = model_of(name)
    tokens = torch.randint(61, (1, T), generator=torch.Generator().manual_seed(2))
    cut = 9
    packed = SequenceInfo.of_lengths([(cut, T - cut)])
    with torch.no_grad():
        found = model.logits(tokens, packed)
        alone = [model.logits(part, SequenceInfo.whole(1, part.shape[1])) for part in (tokens[:, :cut], tokens[:, cut:])]
    torch.testing.assert_close(found, torch.cat(alone, 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", [0, 1])
def test_parameters_are_counted_and_filled(name: str, layer: int) -> None:
    config, sizes = MIXERS[name].Config(n_heads=H), shape(D, T, (name, name))
    mixer = materialized(lambda: MIXERS[name](config, sizes, layer))
    assert sum(p.numel() for p in mixer.parameters()) == MIXERS[name].cost(config, sizes, layer).parameters


def test_rwkv7_starts_as_published() -> None:
    """Values worked out by hand from the published initial weights: width 32, heads of 8, the second of two layers."""
    mixer = materialized(lambda: MIXERS["rwkv7"](MIXERS["rwkv7"].Config(n_heads=H), shape(D, T, ("rwkv7", "rwkv7")), 1))
    head = mixer.head
    for name, position, value in (
        ("w0_HK", (0, 0), -6 + 0.5 - 2.5), ("w0_HK", (3, 7), 0 + 0.5 + 2.5), ("w0_HK", (0, 7), -6 + 6 * (7 / 31) ** 2 + 0.5 + 2.5),
        ("a0_HK", (0, 0), -0.19 - 0.3 - 0.2), ("k_k_HK", (3, 7), 0.71 - 0.05), ("gain_HK", (1, 1), 1.0), ("r_k_HK", (0, 0), -0.04),
    ):  # fmt: skip
        assert getattr(head, name)[position].item() == pytest.approx(value, abs=1e-5), name
    assert mixer.v2.bias[0].item() == pytest.approx(0.73 + 0.2)
    assert mixer.shift_SD[1, 8].item() == pytest.approx(1 - 0.25 ** (0.9 * 0.5))
    torch.testing.assert_close(mixer.wk.weight @ mixer.wk.weight.T, 0.01 * torch.eye(D), rtol=0, atol=1e-6)
    torch.testing.assert_close(mixer.w2.weight.T @ mixer.w2.weight, 0.01 * torch.eye(D), rtol=0, atol=1e-6)
    assert not mixer.wo.weight.any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gated_delta_net", {"n_heads": 5}, r"d_model \(32\) is not a multiple of n_heads \(5\)"),
        ("gated_delta_net", {"n_key_heads": 3}, r"n_heads \(4\) is not a multiple of n_key_heads \(3\)"),
        ("gated_delta_net", {"head_dim": 5, "expand_v": 1.5}, r"is 7\.5 value channels"),
        ("kda", {"n_heads": 3}, r"d_model \(32\) is not a multiple of n_heads \(3\)"),
        ("rwkv7", {"n_heads": 32}, r"leaves 1 channel a head"),
    ],
)
def test_impossible_sizes_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MIXERS[name](MIXERS[name].Config(**{"n_heads": H, **options}), shape(D, T, (name,)), 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_refused_on_a_cpu(name: str) -> None:
    mixer = drawn(name, backend="fla")
    assert "backend 'fla' is for CUDA, and this is cpu" in mixer.why_not_on("cpu", compiled=False)
    assert drawn(name).why_not_on("cpu", compiled=False) == ""
