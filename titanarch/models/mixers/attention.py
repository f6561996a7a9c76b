"""Softmax attention: multi-head, grouped-query and multi-query, with any position scheme (arXiv:1706.03762, 2305.13245).

Shapes: B rows, T tokens, D model dim, H query heads, G key/value heads, K head dim, N distances.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from titanarch.config.errors import ConfigError
from titanarch.config.section import OneOrMore
from titanarch.contract.cost import Cost, linear_cost, mean_visible_keys
from titanarch.contract.init import Init
from titanarch.contract.layers import HeadParams, Linear, local
from titanarch.contract.mixer import MixerConfig, MixResult, SequenceMixer, State, Streams, mixer
from titanarch.contract.position import RELATIVE_POSITIONS, RelativePosition, RelativePositionConfig
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import ContextParallel, Side, Split, Stream
from titanarch.ops.biased_attention import AttentionDropout, AttentionTokens, biased_attention

RelativePositions = OneOrMore[Annotated[RelativePositionConfig, RELATIVE_POSITIONS]]

Positive = Annotated[int, Field(gt=0)]


class AttentionConfig(MixerConfig):
    """[model.mixers.attention]; ``n_heads`` and ``position`` come from [model] unless given here."""

    n_heads: Positive = Field(description="query heads")
    n_kv_heads: Positive | None = Field(None, description="key and value heads, a divisor of n_heads; unset: n_heads")
    head_dim: Positive | None = Field(None, description="channels a head; unset: d_model / n_heads")
    position: RelativePositions = Field((), description="rotations and biases by distance; several are applied together")
    window: Positive | None = Field(None, description="a query sees this many tokens, itself included; unset: all before it")
    scale: float | None = Field(None, description="factor of the logits; unset: 1 / sqrt(head_dim)")
    soft_cap: Annotated[float, Field(gt=0)] | None = Field(None, description="logits become cap * tanh(logits / cap); unset: no cap")
    qk_norm: bool = Field(False, description="RMSNorm on each head's query and key, before rotation")
    sinks: bool = Field(False, description="a learned logit a head in the denominator (attention sinks)")
    output_gate: bool = Field(False, description="multiply the heads' output by sigmoid(x W_g)")
    value_residual: Literal["none", "half", "learned"] = Field(
        "none", description="mix each layer's values with the first layer's: evenly, or by a learned gate a token and head"
    )
    qkv_bias: bool = Field(False, description="biases on the query, key and value projections")
    out_bias: bool = Field(False, description="bias on the output projection")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="probability of dropping an attention weight")

    @field_validator("position")
    @classmethod
    def _each_position_once(cls, position: tuple[RelativePositionConfig, ...]) -> tuple[RelativePositionConfig, ...]:
        kinds = [p.kind for p in position]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            raise ValueError(f"'{twice[0]}' is listed twice; name each position scheme once")
        return position

    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def channels_per_head(self, d_model: int) -> int:
        """Head size, channels; a ValueError where the model's width does not give one."""
        if self.n_heads % self.kv_heads():
            raise ValueError(
                f"attention: n_heads ({self.n_heads}) is not a multiple of n_kv_heads ({self.kv_heads()}); use a divisor of n_heads"
            )
        if self.head_dim is not None:
            return self.head_dim
        if d_model % self.n_heads:
            raise ValueError(f"attention: d_model ({d_model}) is not a multiple of n_heads ({self.n_heads}); change one, or give head_dim")
        return d_model // self.n_heads


@mixer("attention")
class Attention(SequenceMixer):
    """softmax(q k^T scale + bias) v over earlier tokens of the same document."""

    Config = AttentionConfig
    context_parallel = (ContextParallel.GATHER, ContextParallel.HEADS, ContextParallel.RING)
    tensor_parallel = {
        "wq": Split.COLUMN,
        "wk": Split.COLUMN("n_kv_heads"),
        "wv": Split.COLUMN("n_kv_heads"),
        "wg": Split.COLUMN,
        "wl": Split.COLUMN("n_kv_heads"),
        "wo": Split.ROW,
        "q_gain_K": Split.SHARED,
        "k_gain_K": Split.SHARED,
        "head": Split.REPLICATED,
        "position": Split.REPLICATED,
        "sinks_H": Split.PER_HEAD,
        "table_HN": Split.PER_HEAD,
    }
    float8 = frozenset({"wq", "wk", "wv", "wg", "wo"})
    fp32 = frozenset({"head", "position"})
    config: AttentionConfig

    def __init__(self, config: AttentionConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        D, H, G, K = shape.d_model, config.n_heads, config.kv_heads(), config.channels_per_head(shape.d_model)
        self.head_dim = K
        self.is_first = layer == 0
        self.wq = Linear(D, H * K, bias=config.qkv_bias)
        self.wk = Linear(D, G * K, bias=config.qkv_bias)
        self.wv = Linear(D, G * K, bias=config.qkv_bias)
        self.wo = Linear(H * K, D, bias=config.out_bias)
        if config.output_gate:
            self.wg = Linear(D, H * K, bias=False)
        if config.value_residual == "learned" and not self.is_first:
            self.wl = Linear(D, G, bias=True)
        if config.qk_norm:
            self.q_gain_K = nn.Parameter(torch.empty(K))
            self.k_gain_K = nn.Parameter(torch.empty(K))
        if config.sinks:
            self.head = HeadParams({"sinks_H": (H,)})
        self.position = nn.ModuleList(RELATIVE_POSITIONS.of(p)(p, shape, layer, H, K) for p in config.position)

    @staticmethod
    def streams(config: AttentionConfig, shape: ModelShape) -> Mapping[str, Stream]:
        kv = Stream(Side.KEY, config.kv_heads())
        return {"q": Stream(Side.QUERY, config.n_heads), "k": kv, "v": kv}

    @staticmethod
    def cost(config: AttentionConfig, shape: ModelShape, layer: int) -> Cost:
        D, H, G, K = shape.d_model, config.n_heads, config.kv_heads(), config.channels_per_head(shape.d_model)
        cost = linear_cost(D, H * K, bias=config.qkv_bias) + linear_cost(D, G * K, bias=config.qkv_bias)
        cost += linear_cost(D, G * K, bias=config.qkv_bias) + linear_cost(H * K, D, bias=config.out_bias)
        if config.output_gate:
            cost += linear_cost(D, H * K)
        if config.value_residual == "learned" and layer > 0:
            cost += linear_cost(D, G, bias=True)
        for position in config.position:
            cost += RELATIVE_POSITIONS.of(position).cost(position, shape, layer, H, K)
        cached = min(shape.seq_len, config.window or shape.seq_len)
        return cost + Cost(
            parameters=2 * K * config.qk_norm + H * config.sinks,
            forward_flops_per_token=4.0 * H * K * mean_visible_keys(shape.seq_len, config.window),
            state_bytes=2 * 2 * cached * G * K,
        )

    def reset_parameters(self, init: Init) -> None:
        """Linears by the scheme, wo as residual output; gains 1; sinks N(0, 0.02^2); positions their own."""
        for linear in (self.wq, self.wk, self.wv):
            init.linear(linear)
        init.residual_output(self.wo, self.layer)
        if self.config.output_gate:
            init.linear(self.wg)
        if self.config.value_residual == "learned" and not self.is_first:
            init.linear(self.wl)
        if self.config.qk_norm:
            init.constant(self, "q_gain_K", 1.0)
            init.constant(self, "k_gain_K", 1.0)
        if self.config.sinks:
            init.normal(self.head, "sinks_H", 0.02)
        for position in self.relative_positions():
            position.reset_parameters(init)

    def relative_positions(self) -> list[RelativePosition]:
        return [p for p in self.position if isinstance(p, RelativePosition)]

    def project(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        """q [B, T, H, K]; k, v [B, T, G, K]."""
        K = self.head_dim
        q, k, v = (linear(x_BTD).unflatten(-1, (-1, K)) for linear in (self.wq, self.wk, self.wv))
        if self.config.qk_norm:
            q = F.rms_norm(q, (K,), local(self.q_gain_K), eps=1e-6)
            k = F.rms_norm(k, (K,), local(self.k_gain_K), eps=1e-6)
        for position in self.relative_positions():
            q, k = position.rotate(q, k, seq.position_BT)
        if self.config.value_residual != "none":
            v, carry = self._mix_first_values(v, x_BTD, carry)
        return {"q": q, "k": k, "v": v}, carry

    def _mix_first_values(self, v_BTGK: Tensor, x_BTD: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """v <- l v + (1 - l) v of the first layer (arXiv:2410.17897), l = 1/2 or sigmoid(x W_l)."""
        if self.is_first:
            return v_BTGK, carry.with_value("first_values", v_BTGK)
        first = carry.values.get("first_values")
        if first is None or first.shape != v_BTGK.shape:
            raise ConfigError(
                "attention: value_residual needs attention with the same n_kv_heads and head_dim, and value_residual on, in block 0"
            )
        share = torch.sigmoid(self.wl(x_BTD)).unsqueeze(-1) if self.config.value_residual == "learned" else 0.5
        return first + share * (v_BTGK - first), carry

    def head_params(self, seq: SequenceInfo, carry: Carry) -> tuple[Mapping[str, Tensor], Carry]:
        """sinks [H]; table [H, N], the sum of all biases for the distances 0 to N - 1."""
        params: dict[str, Tensor] = dict(self.head()) if self.config.sinks else {}
        for position in self.relative_positions():
            if position.has_table:
                table_HN, carry = position(seq.length, False, carry)
                params["table_HN"] = params["table_HN"] + table_HN if "table_HN" in params else table_HN
        return params, carry

    @staticmethod
    def mix(
        config: AttentionConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: State | None = None
    ) -> MixResult:
        """Attention of the local heads: y [B, T, H, K]. With a state, keys and values are appended to its cache."""
        q, k, v = streams["q"], streams["k"], streams["v"]
        if state is not None:
            k, v = torch.cat([state["k"], k], dim=1), torch.cat([state["v"], v], dim=1)
        query, key = seq.query, seq.key
        dropout = None
        if config.dropout and query.seed is not None:
            dropout = AttentionDropout(config.dropout, seed=query.seed, row_B=query.row_B, site=seq.site, first_head=seq.first_head)
        y, lse = biased_attention(
            q,
            k,
            v,
            query=AttentionTokens(query.index_T, query.document_BT),
            key=AttentionTokens(key.index_T, key.document_BT),
            scale=q.shape[-1] ** -0.5 if config.scale is None else config.scale,
            table_HN=head_params.get("table_HN"),
            packed=query.packed,
            contiguous=query.contiguous and key.contiguous,
            window=config.window,
            soft_cap=config.soft_cap,
            sinks_H=head_params.get("sinks_H") if seq.holds_sinks else None,
            dropout=dropout,
            return_lse=seq.wants_lse,
        )
        return MixResult(y, lse, state=None if state is None else {"k": k, "v": v})

    def merge(self, y_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """Gate, then the output projection: [B, T, D]."""
        y = y_BTHV.flatten(2)
        if self.config.output_gate:
            y = y * torch.sigmoid(self.wg(x_BTD))
        out: Tensor = self.wo(y)
        return out

    def initial_state(self, n_rows: int, dtype: torch.dtype, device: torch.device) -> State:
        """An empty cache of keys and values, [B, 0, G, K] each."""
        empty = torch.empty(n_rows, 0, self.config.kv_heads(), self.head_dim, dtype=dtype, device=device)
        return {"k": empty, "v": empty}
