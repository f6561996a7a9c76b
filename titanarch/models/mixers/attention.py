"""Softmax attention: multi-head, grouped-query and multi-query, with any position scheme (arXiv:1706.03762, 2305.13245).

Shapes: B rows, T tokens, D model dim, H query heads, G key/value heads, K head dim, N distances.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from titanarch.contract.card import Card
from titanarch.contract.cost import Cost, linear_cost, mean_visible_keys
from titanarch.contract.init import Init
from titanarch.contract.layers import Linear, local
from titanarch.contract.mixer import MixerConfig, MixResult, State, Streams, mixer
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import Side, Split, Stream
from titanarch.models.mixers.softmax import Positive, SoftmaxConfig, SoftmaxMixer, attend, with_cache


class AttentionConfig(SoftmaxConfig):
    """[model.mixers.attention]; ``n_heads`` and ``position`` come from [model] unless given here."""

    maps: ClassVar[int] = 1
    """Attention maps, so queries, that a head is made of; more in differential attention."""
    key_maps: ClassVar[int] = 1
    """Keys of a key head, and how many times as wide as a key its value is."""

    n_kv_heads: Positive | None = Field(None, description="key and value heads, a divisor of n_heads; unset: n_heads")
    head_dim: Positive | None = Field(None, description="channels of a query and a key; unset: those of d_model over the heads")
    qk_norm: bool = Field(False, description="RMSNorm on each head's query and key, before rotation")
    value_residual: Literal["none", "half", "learned"] = Field(
        "none", description="mix each layer's values with the first layer's: evenly, or by a learned gate a token and head"
    )
    qkv_bias: bool = Field(False, description="biases on the query, key and value projections")
    out_bias: bool = Field(False, description="bias on the output projection")

    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def channels_per_head(self, d_model: int) -> int:
        """Channels of a query; a ValueError where the model's width does not give them."""
        if self.n_heads % self.kv_heads():
            raise ValueError(
                f"{self.kind}: n_heads ({self.n_heads}) is not a multiple of n_kv_heads ({self.kv_heads()}); use a divisor of n_heads"
            )
        if self.head_dim is not None:
            return self.head_dim
        n_parts = self.key_maps * self.n_heads
        if d_model % n_parts:
            wanted = f"{'' if self.key_maps == 1 else f'{self.key_maps} x '}n_heads ({self.n_heads})"
            raise ValueError(f"{self.kind}: d_model ({d_model}) is not a multiple of {wanted}; change one, or give head_dim")
        return d_model // n_parts

    def check_sizes(self, d_model: int) -> None:
        self.channels_per_head(d_model)

    def check_first(self, first: MixerConfig, d_model: int) -> None:
        """The values of block 0 are mixed in, so it must make such ones and pass them on."""
        if self.value_residual == "none":
            return
        passed_on = first._value_shape(d_model) if isinstance(first, AttentionConfig) and first.value_residual != "none" else None
        if passed_on != self._value_shape(d_model):
            raise ValueError(
                f"{self.kind}: value_residual ('{self.value_residual}') mixes in the values of block 0, whose mixer ({first.kind}) passes "
                "on none of this shape: begin layers with an attention mixer of the same n_kv_heads and head_dim and with value_residual, "
                "or set it to 'none'"
            )

    def _value_shape(self, d_model: int) -> tuple[int, int]:
        """Heads and channels."""
        return self.kv_heads(), self.key_maps * self.channels_per_head(d_model)


@mixer("attention")
class Attention(SoftmaxMixer):
    """softmax(q k^T scale + bias) v over earlier tokens of the same document."""

    Config: ClassVar[type[AttentionConfig]] = AttentionConfig
    card = Card(
        "Softmax attention: grouped queries, windows, sinks, soft cap, QK-norm, output gate, value residual",
        "arXiv:1706.03762, 2305.13245",
        "transformers Llama, Mistral, Qwen3, Gemma2, GptOss, SmolLM3, Cohere2, Qwen3Next",
    )
    tensor_parallel = {
        **SoftmaxMixer.tensor_parallel,
        "wq": Split.COLUMN,
        "wk": Split.COLUMN("n_kv_heads"),
        "wv": Split.COLUMN("n_kv_heads"),
        "wl": Split.COLUMN("n_kv_heads"),
        "q_gain_K": Split.SHARED,
        "k_gain_K": Split.SHARED,
    }
    float8 = frozenset({"wq", "wk", "wv", "wg", "wo"})
    config: AttentionConfig

    def __init__(self, config: AttentionConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        D, H, G, K = shape.d_model, config.n_heads, config.kv_heads(), config.channels_per_head(shape.d_model)
        self.head_dim = K
        self.is_first = layer == 0
        self.wq = Linear(D, config.maps * H * K, bias=config.qkv_bias)
        self.wk = Linear(D, config.key_maps * G * K, bias=config.qkv_bias)
        self.wv = Linear(D, config.key_maps * G * K, bias=config.qkv_bias)
        if config.value_residual == "learned" and not self.is_first:
            self.wl = Linear(D, G, bias=True)
        if config.qk_norm:
            self.q_gain_K = nn.Parameter(torch.empty(K))
            self.k_gain_K = nn.Parameter(torch.empty(K))
        self.build_ends(shape, logit_channels=K, turned_channels=K, d_out=config.key_maps * H * K, out_bias=config.out_bias)

    @staticmethod
    def streams(config: AttentionConfig, shape: ModelShape) -> Mapping[str, Stream]:
        kv = Stream(Side.KEY, config.kv_heads())
        return {"q": Stream(Side.QUERY, config.n_heads), "k": kv, "v": kv}

    @staticmethod
    def cost(config: AttentionConfig, shape: ModelShape, layer: int) -> Cost:
        D, H, G, K = shape.d_model, config.n_heads, config.kv_heads(), config.channels_per_head(shape.d_model)
        V = config.key_maps * K
        cost = linear_cost(D, config.maps * H * K, bias=config.qkv_bias)
        cost += linear_cost(D, G * V, bias=config.qkv_bias) + linear_cost(D, G * V, bias=config.qkv_bias)
        if config.value_residual == "learned" and layer > 0:
            cost += linear_cost(D, G, bias=True)
        cost += SoftmaxMixer.ends_cost(config, shape, layer, turned_channels=K, d_out=H * V, out_bias=config.out_bias)
        cached = min(shape.seq_len, config.window or shape.seq_len)
        return cost + Cost(
            parameters=2 * K * config.qk_norm,
            forward_flops_per_token=2.0 * config.maps * H * (K + V) * mean_visible_keys(shape.seq_len, config.window),
            state_bytes=2 * 2 * cached * G * V,
        )

    def reset_parameters(self, init: Init) -> None:
        """Linears by the scheme, wo as residual output; gains 1; sinks N(0, 0.02^2); positions their own."""
        for linear in (self.wq, self.wk, self.wv):
            init.linear(linear)
        if self.config.value_residual == "learned" and not self.is_first:
            init.linear(self.wl)
        if self.config.qk_norm:
            init.constant(self, "q_gain_K", 1.0)
            init.constant(self, "k_gain_K", 1.0)
        self.reset_ends(init)

    def project(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        """q [B, T, H, K]; k, v [B, T, G, K]."""
        K = self.head_dim
        q, k = (linear(x_BTD).unflatten(-1, (-1, K)) for linear in (self.wq, self.wk))
        v = self.values(x_BTD).unflatten(-1, (-1, self.config.key_maps * K))
        q, k = self.normed(q, k)
        for position in self.relative_positions():
            q, k = position.rotate(q, k, seq.position_BT)
        if self.config.value_residual != "none":
            v, carry = self._mix_first_values(v, x_BTD, carry)
        return {"q": q, "k": k, "v": v}, carry

    def normed(self, q_BTHK: Tensor, k_BSGK: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys by QK-norm, where there is one."""
        if not self.config.qk_norm:
            return q_BTHK, k_BSGK
        gains_K = (local(self.q_gain_K), local(self.k_gain_K))
        q_BTHK, k_BSGK = (F.rms_norm(x, (self.head_dim,), gain_K, eps=1e-6) for x, gain_K in zip((q_BTHK, k_BSGK), gains_K, strict=True))
        return q_BTHK, k_BSGK

    def values(self, x_BTD: Tensor) -> Tensor:
        """Values of the local heads, [B, T, channels of all]."""
        out: Tensor = self.wv(x_BTD)
        return out

    def _mix_first_values(self, v_BTGK: Tensor, x_BTD: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """v <- l v + (1 - l) v of the first layer (arXiv:2410.17897), l = 1/2 or sigmoid(x W_l)."""
        if self.is_first:
            return v_BTGK, carry.with_value("first_values", v_BTGK)
        first = carry.values["first_values"]
        share = torch.sigmoid(self.wl(x_BTD)).unsqueeze(-1) if self.config.value_residual == "learned" else 0.5
        return first + share * (v_BTGK - first), carry

    @staticmethod
    def mix(
        config: AttentionConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: State | None = None
    ) -> MixResult:
        """Attention of the local heads: y [B, T, H, K]. With a state, keys and values are appended to its cache."""
        (k, v), state = with_cache(streams, state, ("k", "v"))
        y, lse = attend(config, streams["q"], k, v, head_params, seq)
        return MixResult(y, lse, state)

    def initial_state(self, n_rows: int, dtype: torch.dtype, device: torch.device) -> State:
        """An empty cache of keys and values, [B, 0, G, K] each."""
        empty = torch.empty(n_rows, 0, self.config.kv_heads(), self.head_dim, dtype=dtype, device=device)
        return {"k": empty, "v": empty}
