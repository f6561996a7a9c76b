"""Gated linear attention: each key channel decays by a gate of its own that the token sets (arXiv:2312.06635).

S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t / sqrt(K), alpha = sigmoid(W_2 W_1 x + b)^(1/16). The output is
W_o (RMSNorm of each head(y) * silu(x W_g)). There is no rotation.

Shapes: B rows, T tokens, D model dim, H heads, K key dim, V value dim, R rank of the gate.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from titanarch.contract.card import Card
from titanarch.contract.cost import Cost, linear_cost
from titanarch.contract.init import Init
from titanarch.contract.layers import Linear, local
from titanarch.contract.mixer import MixResult, State, Streams, Transition, mixer
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import Side, Split, Stream
from titanarch.models.mixers.linear_attention import (
    LinearAttention,
    LinearAttentionConfig,
    Positive,
    PositiveFloat,
    decayed_transition,
    mix_decayed,
)
from titanarch.models.mixers.recurrent import FLA


class GLAConfig(LinearAttentionConfig):
    """[model.mixers.gla]; ``n_heads`` comes from [model] unless given here."""

    expand_k: PositiveFloat = Field(0.5, description="width of all keys / d_model")
    expand_v: PositiveFloat = Field(1.0, description="width of all values / d_model")
    gate_low_rank_dim: Positive = Field(16, description="rank of the gate's projection, channels")
    gate_logit_normalizer: PositiveFloat = Field(16.0, description="the gate is sigmoid to the power of 1 / this")


@mixer("gla")
class GLA(LinearAttention):
    """See the head of this file."""

    Config = GLAConfig
    card = Card(
        title="Gated linear attention: a gate a key channel",
        paper="arXiv:2312.06635",
        reference="the recurrence token by token, written apart",
        kernels=FLA,
    )
    tensor_parallel = {
        **LinearAttention.tensor_parallel,
        "gate_down": Split.SHARED,
        "gate_up": Split.COLUMN,
        "gain_V": Split.SHARED,
    }
    config: GLAConfig

    def __init__(self, config: GLAConfig, shape: ModelShape, layer: int) -> None:
        """Raises ConfigError where the sizes do not fit."""
        super().__init__(config, shape, layer)
        R = config.gate_low_rank_dim
        self.gate_down = Linear(shape.d_model, R, bias=False)
        self.gate_up = Linear(R, config.n_heads * self.key_dim, bias=True)
        self.gain_V = nn.Parameter(torch.empty(self.value_dim))

    @staticmethod
    def streams(config: GLAConfig, shape: ModelShape) -> Mapping[str, Stream]:
        return dict.fromkeys(("q", "k", "v", "gate"), Stream(Side.QUERY, config.n_heads))

    @staticmethod
    def cost(config: GLAConfig, shape: ModelShape, layer: int) -> Cost:
        R, (K, V) = config.gate_low_rank_dim, config.channels(shape.d_model)
        gate = linear_cost(shape.d_model, R) + linear_cost(R, config.n_heads * K, bias=True)
        return LinearAttention.cost(config, shape, layer) + gate + Cost(parameters=V)

    def reset_parameters(self, init: Init) -> None:
        """Linears by the scheme, wo as residual output; gains 1."""
        super().reset_parameters(init)
        for linear in (self.gate_down, self.gate_up):
            init.linear(linear)
        init.constant(self, "gain_V", 1.0)

    def project(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        """q, k [B, T, H, K]; v [B, T, H, V]; the gate's logits [B, T, H, K]."""
        q, k, gate = (y.unflatten(-1, (-1, self.key_dim)) for y in (self.wq(x_BTD), self.wk(x_BTD), self.gate_up(self.gate_down(x_BTD))))
        return {"q": q, "k": k, "v": self.wv(x_BTD).unflatten(-1, (-1, self.value_dim)), "gate": gate}, carry

    @staticmethod
    def mix(
        config: GLAConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: State | None = None
    ) -> MixResult:
        """y [B, T, H, V]; the state is [B, H, K, V]."""
        return mix_decayed(config, streams, _log_decay(config, streams["gate"]), seq, state)

    @staticmethod
    def transition(config: GLAConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> Transition:
        """decay [B, H, K, 1], state [B, H, K, V]."""
        return decayed_transition(streams, _log_decay(config, streams["gate"]), seq)

    def merge(self, y_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """The norm of each head with its gain, the gate, the output projection: [B, T, D]."""
        return self.gated(y_BTHV, x_BTD, local(self.gain_V))


def _log_decay(config: GLAConfig, gate_BTHK: Tensor) -> Tensor:
    """At least fp32."""
    return F.logsigmoid(gate_BTHK.to(torch.promote_types(gate_BTHK.dtype, torch.float32))) / config.gate_logit_normalizer
