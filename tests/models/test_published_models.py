"""Whole models against transformers, an implementation by other hands: weights copied, logits in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import titanarch.models.components  # noqa: F401 (registers all)
from titanarch.contract.sequence import SequenceInfo
from titanarch.models.decoder import Decoder, DecoderConfig

transformers = pytest.importorskip("transformers", reason="the extra 'reference' is not installed")

V, T, D, H, L, F = 61, 40, 32, 4, 2, 48
COMMON = {"vocab_size": V, "hidden_size": D, "num_attention_heads": H, "num_hidden_layers": L, "attn_implementation": "eager"}
BASE = {"n_layers": L, "d_model": D, "n_heads": H}


class Copy:
    """Copies weights of a transformers model into ours by name; each of ours must be given once."""

    def __init__(self, ours: Decoder, theirs: nn.Module) -> None:
        self.ours, self.source = dict(ours.named_parameters()), theirs.state_dict()

    def __call__(self, name: str, source: str, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        value = change(self.source[source])
        target = self.ours.pop(name)
        assert target.shape == value.shape, f"{name} {tuple(target.shape)} from {source} {tuple(value.shape)}"
        target.data = value.clone()

    def linear(self, name: str, source: str, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self(f"{name}.weight", f"{source}.weight", change)
        if f"{name}.bias" in self.ours:
            self(f"{name}.bias", f"{source}.bias")

    def done(self) -> None:
        assert not self.ours, f"not copied: {sorted(self.ours)}"


def llama_like(copy: Copy, norms: dict[str, str], extra: Callable[[Copy, str, str], None] = lambda *_: None, *, tied: bool = False) -> None:
    copy("embedding.weight", "model.embed_tokens.weight")
    copy("final_norm.weight", "model.norm.weight")
    if not tied:
        copy("head.weight", "lm_head.weight")
    for i in range(L):
        mine, their = f"layers.{i}", f"model.layers.{i}"
        for letter in "qkvo":
            copy.linear(f"{mine}.mixer.w{letter}", f"{their}.self_attn.{letter}_proj")
        for part in ("gate", "up", "down"):
            copy.linear(f"{mine}.channel.{part}", f"{their}.mlp.{part}_proj")
        for ours, theirs in norms.items():
            copy(f"{mine}.norms.{ours}.weight", f"{their}.{theirs}.weight")
        extra(copy, mine, their)


PRE_NORM = {"mixer_norm": "input_layernorm", "channel_norm": "post_attention_layernorm"}


def llama() -> tuple[dict[str, Any], nn.Module, Callable[[Copy], None]]:
    config = transformers.LlamaConfig(**COMMON, num_key_value_heads=2, intermediate_size=F, rms_norm_eps=1e-5, rope_theta=10000.0)
    table = {
        "norm": "rmsnorm",
        "channel": {"kind": "swiglu", "d_ff": F},
        "position": {"relative": "rotary"},
        "mixers": {"attention": {"n_kv_heads": 2}},
    }
    return table, transformers.LlamaForCausalLM(config), lambda copy: llama_like(copy, PRE_NORM)


def mistral() -> tuple[dict[str, Any], nn.Module, Callable[[Copy], None]]:
    config = transformers.MistralConfig(
        **COMMON, num_key_value_heads=1, intermediate_size=F, rms_norm_eps=1e-5, sliding_window=9, rope_theta=10000.0, head_dim=D // H
    )
    table = {
        "channel": {"kind": "swiglu", "d_ff": F},
        "position": {"relative": "rotary"},
        "mixers": {"attention": {"n_kv_heads": 1, "window": 9}},
    }
    return table, transformers.MistralForCausalLM(config), lambda copy: llama_like(copy, PRE_NORM)


def qwen3() -> tuple[dict[str, Any], nn.Module, Callable[[Copy], None]]:
    config = transformers.Qwen3Config(
        **COMMON, num_key_value_heads=2, intermediate_size=F, head_dim=12, rms_norm_eps=1e-6, tie_word_embeddings=True
    )

    def gains(copy: Copy, mine: str, their: str) -> None:
        for letter in "qk":
            copy(f"{mine}.mixer.{letter}_gain_K", f"{their}.self_attn.{letter}_norm.weight")

    table = {
        "norm": {"kind": "rmsnorm", "eps": 1e-6},
        "channel": {"kind": "swiglu", "d_ff": F},
        "position": {"relative": {"kind": "rotary", "theta": config.rope_parameters["rope_theta"]}},
        "mixers": {"attention": {"n_kv_heads": 2, "head_dim": 12, "qk_norm": True}},
        "tied_head": True,
    }
    return table, transformers.Qwen3ForCausalLM(config), lambda copy: llama_like(copy, PRE_NORM, gains, tied=True)


def gpt2() -> tuple[dict[str, Any], nn.Module, Callable[[Copy], None]]:
    config = transformers.GPT2Config(vocab_size=V, n_embd=D, n_head=H, n_layer=L, n_positions=64, attn_implementation="eager")

    def weights(copy: Copy) -> None:
        copy("embedding.weight", "transformer.wte.weight")
        copy("position.table.weight", "transformer.wpe.weight")
        for name in ("weight", "bias"):
            copy(f"final_norm.{name}", f"transformer.ln_f.{name}")
        for i in range(L):
            mine, their = f"layers.{i}", f"transformer.h.{i}"
            for j, letter in enumerate("qkv"):
                part = slice(j * D, (j + 1) * D)
                copy(f"{mine}.mixer.w{letter}.weight", f"{their}.attn.c_attn.weight", lambda w, part=part: w[:, part].T)
                copy(f"{mine}.mixer.w{letter}.bias", f"{their}.attn.c_attn.bias", lambda b, part=part: b[part])
            for ours, theirs in (("mixer.wo", "attn.c_proj"), ("channel.up", "mlp.c_fc"), ("channel.down", "mlp.c_proj")):
                copy(f"{mine}.{ours}.weight", f"{their}.{theirs}.weight", lambda w: w.T)
                copy(f"{mine}.{ours}.bias", f"{their}.{theirs}.bias")
            for ours, theirs in (("mixer_norm", "ln_1"), ("channel_norm", "ln_2")):
                for name in ("weight", "bias"):
                    copy(f"{mine}.norms.{ours}.{name}", f"{their}.{theirs}.{name}")

    table = {
        "norm": "layernorm",
        "channel": {"kind": "mlp", "bias": True, "activation": {"kind": "gelu", "approximate": "tanh"}},
        "position": {"absolute": {"kind": "learned", "max_length": 64}},
        "mixers": {"attention": {"qkv_bias": True, "out_bias": True}},
        "tied_head": True,
    }
    return table, transformers.GPT2LMHeadModel(config), weights


def cohere() -> tuple[dict[str, Any], nn.Module, Callable[[Copy], None]]:
    config = transformers.CohereConfig(
        **COMMON, num_key_value_heads=2, intermediate_size=F, logit_scale=1.0, rope_theta=10000.0, tie_word_embeddings=True
    )
    table = {
        "residual": "parallel",
        "norm": {"kind": "layernorm", "bias": False},
        "channel": {"kind": "swiglu", "d_ff": F},
        "position": {"relative": {"kind": "rotary", "layout": "interleaved", "theta": config.rope_parameters["rope_theta"]}},
        "mixers": {"attention": {"n_kv_heads": 2}},
        "tied_head": True,
    }
    return table, transformers.CohereForCausalLM(config), lambda copy: llama_like(copy, {"mixer_norm": "input_layernorm"}, tied=True)


def gemma2() -> tuple[dict[str, Any], nn.Module, Callable[[Copy], None]]:
    config = transformers.Gemma2Config(
        **COMMON, num_key_value_heads=2, intermediate_size=F, head_dim=8, query_pre_attn_scalar=8, sliding_window=9, rms_norm_eps=1e-6,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip

    def weights(copy: Copy) -> None:
        # Gemma's norms multiply by 1 + weight.
        for name in [name for name in copy.source if "norm" in name]:
            copy.source[name] = copy.source[name] + 1
        norms = {
            "mixer_norm": "input_layernorm",
            "mixer_out_norm": "post_attention_layernorm",
            "channel_norm": "pre_feedforward_layernorm",
            "channel_out_norm": "post_feedforward_layernorm",
        }
        llama_like(copy, norms, tied=True)

    attention = {"kind": "attention", "n_kv_heads": 2, "head_dim": 8, "soft_cap": 50.0}
    table = {
        "residual": "sandwich",
        "norm": {"kind": "rmsnorm", "eps": 1e-6},
        "channel": {"kind": "geglu", "d_ff": F, "approximate": "tanh"},
        "position": {"relative": "rotary"},
        "layers": ["local", "attention"],
        "mixers": {"local": {**attention, "window": 9}, "attention": attention},
        "scale_embedding": True,
        "head_soft_cap": 30.0,
        "tied_head": True,
    }
    return table, transformers.Gemma2ForCausalLM(config), weights


def smollm3() -> tuple[dict[str, Any], nn.Module, Callable[[Copy], None]]:
    """Every second layer without positions."""
    config = transformers.SmolLM3Config(
        **COMMON, num_key_value_heads=2, intermediate_size=F, rms_norm_eps=1e-6, no_rope_layers=[1, 0], tie_word_embeddings=True,
        pad_token_id=0,
    )  # fmt: skip
    attention = {"kind": "attention", "n_kv_heads": 2}
    table = {
        "norm": {"kind": "rmsnorm", "eps": 1e-6},
        "channel": {"kind": "swiglu", "d_ff": F},
        "position": {"relative": {"kind": "rotary", "theta": config.rope_parameters["rope_theta"]}},
        "layers": ["attention", "nope"],
        "mixers": {"attention": attention, "nope": {**attention, "position": []}},
        "tied_head": True,
    }
    return table, transformers.SmolLM3ForCausalLM(config), lambda copy: llama_like(copy, PRE_NORM, tied=True)


def cohere2() -> tuple[dict[str, Any], nn.Module, Callable[[Copy], None]]:
    """Layers with a window and rotation, and global ones without positions."""
    config = transformers.Cohere2Config(
        **COMMON, num_key_value_heads=2, intermediate_size=F, logit_scale=1.0, sliding_window=9, tie_word_embeddings=True,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    rotary = {"kind": "rotary", "layout": "interleaved", "theta": config.rope_parameters["rope_theta"]}
    table = {
        "residual": "parallel",
        "norm": {"kind": "layernorm", "bias": False},
        "channel": {"kind": "swiglu", "d_ff": F},
        "layers": ["local", "global"],
        "mixers": {
            "local": {"kind": "attention", "n_kv_heads": 2, "window": 9, "position": rotary},
            "global": {"kind": "attention", "n_kv_heads": 2},
        },
        "tied_head": True,
    }
    return table, transformers.Cohere2ForCausalLM(config), lambda copy: llama_like(copy, {"mixer_norm": "input_layernorm"}, tied=True)


@pytest.mark.parametrize("build", [llama, mistral, qwen3, gpt2, cohere, gemma2, smollm3, cohere2], ids=lambda f: f.__name__)
def test_logits_equal_those_of_transformers(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    table, theirs, copy_weights = build()
    theirs = theirs.double().eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    ours = Decoder(DecoderConfig.model_validate({**BASE, **table}), V, T).double()
    copy = Copy(ours, theirs)
    copy_weights(copy)
    copy.done()
    x = torch.randint(V, (2, T))
    with torch.no_grad():
        expected = theirs(x).logits.double()
        found = ours.logits(x, SequenceInfo.whole(2, T)).double()
    # Both compute rotations in fp32, ours from the same angles by another route.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
