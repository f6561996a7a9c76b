"""What mixers by softmax share: positions, sinks and dropout of their logits, decoding with a cache, and the gate of their output.

Shapes: B rows, T queries, S keys, H query heads, G key heads, K key dim, V value dim, N distances.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from titanarch.config.section import OneOrMore
from titanarch.contract.cost import Cost, linear_cost
from titanarch.contract.init import Init
from titanarch.contract.layers import HeadParams, Linear
from titanarch.contract.mixer import MixerConfig, SequenceMixer, State, Streams
from titanarch.contract.position import RELATIVE_POSITIONS, RelativePosition, RelativePositionConfig
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import ContextParallel, Split
from titanarch.ops.biased_attention import AttentionDropout, AttentionTokens, biased_attention

RelativePositions = OneOrMore[Annotated[RelativePositionConfig, RELATIVE_POSITIONS]]

Positive = Annotated[int, Field(gt=0)]


class SoftmaxConfig(MixerConfig):
    """What every mixer by softmax takes; ``n_heads`` and ``position`` come from [model] unless given here."""

    n_heads: Positive = Field(description="query heads")
    position: RelativePositions = Field((), description="rotations and biases by distance; several are applied together")
    window: Positive | None = Field(None, description="a query sees this many tokens, itself included; unset: all before it")
    scale: float | None = Field(None, description="factor of the logits; unset: 1 / sqrt(channels of a query)")
    soft_cap: Annotated[float, Field(gt=0)] | None = Field(None, description="logits become cap * tanh(logits / cap); unset: no cap")
    sinks: bool = Field(False, description="a learned logit a head in the denominator (attention sinks)")
    output_gate: bool = Field(False, description="multiply the heads' output by sigmoid(x W_g)")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="probability of dropping an attention weight")

    @field_validator("position")
    @classmethod
    def _each_position_once(cls, position: tuple[RelativePositionConfig, ...]) -> tuple[RelativePositionConfig, ...]:
        kinds = [p.kind for p in position]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            raise ValueError(f"'{twice[0]}' is listed twice; name each position scheme once")
        return position


class SoftmaxMixer(SequenceMixer):
    """A mixer whose ``mix`` is ``attend``, with the output projection ``wo`` and, where it is gated, the gate ``wg``."""

    context_parallel = (ContextParallel.GATHER, ContextParallel.HEADS, ContextParallel.RING)
    tensor_parallel: ClassVar[Mapping[str, Split]] = {
        "wg": Split.COLUMN,
        "wo": Split.ROW,
        "head": Split.REPLICATED,
        "position": Split.REPLICATED,
        "sinks_H": Split.PER_HEAD,
        "table_HN": Split.PER_HEAD,
    }
    fp32 = frozenset({"head", "position"})
    both_ways: ClassVar[bool] = False
    """Whether tables reach to keys after the query."""
    config: SoftmaxConfig
    wo: Linear
    wg: Linear
    logit_channels: int
    """Channels of a query, over which a logit sums."""

    def build_ends(self, shape: ModelShape, *, logit_channels: int, turned_channels: int, d_out: int, out_bias: bool = False) -> None:
        """Allocate what lies beside the projections of queries, keys and values.

        ``turned_channels``: of a query and a key, those that rotations are given; ``d_out``: channels of all heads' output.
        """
        config = self.config
        self.logit_channels = logit_channels
        self.wo = Linear(d_out, shape.d_model, bias=out_bias)
        if config.output_gate:
            self.wg = Linear(shape.d_model, d_out, bias=False)
        if config.sinks:
            self.head = HeadParams({"sinks_H": (config.n_heads,)})
        made = (RELATIVE_POSITIONS.of(p)(p, shape, self.layer, config.n_heads, turned_channels) for p in config.position)
        self.position = nn.ModuleList(made)

    @staticmethod
    def ends_cost(
        config: SoftmaxConfig, shape: ModelShape, layer: int, *, turned_channels: int, d_out: int, out_bias: bool = False
    ) -> Cost:
        """Of what ``build_ends`` allocates."""
        cost = linear_cost(d_out, shape.d_model, bias=out_bias) + Cost(parameters=config.n_heads * config.sinks)
        if config.output_gate:
            cost += linear_cost(shape.d_model, d_out)
        for position in config.position:
            cost += RELATIVE_POSITIONS.of(position).cost(position, shape, layer, config.n_heads, turned_channels)
        return cost

    def reset_ends(self, init: Init) -> None:
        """wo as residual output, wg by the scheme, sinks N(0, 0.02^2), positions their own."""
        init.residual_output(self.wo, self.layer)
        if self.config.output_gate:
            init.linear(self.wg)
        if self.config.sinks:
            init.normal(self.head, "sinks_H", 0.02)
        for position in self.relative_positions():
            position.reset_parameters(init)

    def grow_from(self, base: "SoftmaxMixer") -> None:
        """Logits are sums over a query's channels, which training aligns: their scale falls by 1/K beyond the base's K."""
        if self.logit_channels != base.logit_channels:
            scale = base.logit_channels**-0.5 if base.config.scale is None else base.config.scale
            self.config = self.config.model_copy(update={"scale": scale * base.logit_channels / self.logit_channels})

    def relative_positions(self) -> list[RelativePosition]:
        return [p for p in self.position if isinstance(p, RelativePosition)]

    def head_params(self, seq: SequenceInfo, carry: Carry) -> tuple[Mapping[str, Tensor], Carry]:
        """sinks [H]; table [H, N], the sum of all biases for the distances 0 to N - 1, or both ways."""
        params: dict[str, Tensor] = dict(self.head()) if self.config.sinks else {}
        for position in self.relative_positions():
            if position.has_table:
                table_HN, carry = position(seq.length, self.both_ways, carry)
                params["table_HN"] = params["table_HN"] + table_HN if "table_HN" in params else table_HN
        return params, carry

    def merge(self, y_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """Gate, then the output projection: [B, T, D]."""
        y = y_BTHV.flatten(2)
        if self.config.output_gate:
            y = y * torch.sigmoid(self.wg(x_BTD))
        out: Tensor = self.wo(y)
        return out


def with_cache(streams: Streams, state: State | None, names: tuple[str, ...]) -> tuple[list[Tensor], State | None]:
    """The streams ``names`` after what the state holds of them, in that order, and the new state; without a state as they are."""
    if state is None:
        return [streams[name] for name in names], None
    cached = {name: torch.cat([state[name], streams[name]], dim=1) for name in names}
    return list(cached.values()), cached


def attend(
    config: SoftmaxConfig,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    head_params: Mapping[str, Tensor],
    seq: MixSequence,
    *,
    scale: float | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention of the local heads as ``config`` says: y [B, T, H, V], and lse [B, T, H] where ``seq`` wants it.

    ``scale``: of the logits where the config gives none; None: 1 / sqrt(K). ``causal``: a query sees no later key.
    """
    query, key = seq.query, seq.key
    dropout = None
    if config.dropout and query.seed is not None:
        dropout = AttentionDropout(config.dropout, seed=query.seed, row_B=query.row_B, site=seq.site, first_head=seq.first_head)
    if config.scale is not None:
        scale = config.scale
    return biased_attention(
        q_BTHK,
        k_BSGK,
        v_BSGV,
        query=AttentionTokens(query.index_T, query.document_BT),
        key=AttentionTokens(key.index_T, key.document_BT),
        scale=q_BTHK.shape[-1] ** -0.5 if scale is None else scale,
        table_HN=head_params.get("table_HN"),
        causal=causal,
        packed=query.packed,
        contiguous=query.contiguous and key.contiguous,
        window=config.window,
        soft_cap=config.soft_cap,
        sinks_H=head_params.get("sinks_H") if seq.holds_sinks else None,
        dropout=dropout,
        return_lse=seq.wants_lse,
    )
