"""Kimi Delta Attention (Kimi Linear, arXiv:2510.26692): a delta rule whose key channels decay each at their own rate.

    S_t = S_{t-1} diag(alpha_t) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,    y_t = S_t q_t / sqrt(K)

with alpha = exp(-A softplus(x W_a1 W_a2 + bias)) a key channel, beta = sigmoid(x W_b) a head; q, k and v pass a short convolution and
SiLU, q and k are of unit length. The output gate is of low rank too, and a sigmoid.

Shapes: B rows, T tokens, D model dim, H heads, K channels a head, of keys and of values.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from titanarch.contract.card import Card
from titanarch.contract.cost import Cost, linear_cost
from titanarch.contract.init import Init
from titanarch.contract.layers import HeadParams, Linear, local
from titanarch.contract.mixer import MixerConfig, Streams, mixer
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import Side, Split, Stream
from titanarch.models.mixers.delta_rule import FLOPS_OF_STATE, DeltaRuleMixer, divided_width, gated_norm
from titanarch.models.mixers.recurrent import BACKEND, FLA, Backend, log_uniform, step_biases
from titanarch.models.short_conv import ShortConv

Positive = Annotated[int, Field(gt=0)]

EPS = 1e-5
"""Of the norm of a head's output."""


class KDAConfig(MixerConfig):
    """[model.mixers.kda]; ``n_heads`` comes from [model] unless given here."""

    n_heads: Positive = Field(description="heads, each with a state")
    head_dim: Positive | None = Field(None, description="channels of a head's key and value; unset: d_model / n_heads")
    conv_size: Positive = Field(4, description="taps of the causal convolutions, tokens")
    backend: Backend = Field("auto", description=BACKEND)
    rank: Positive | None = Field(None, description="rank of the maps that make decays and the output gate, channels; unset: head_dim")

    def channels(self, d_model: int) -> int:
        """K; ConfigError where the model's width does not give one."""
        return self.head_dim or divided_width("kda", d_model, self.n_heads)


@mixer("kda")
class KDA(DeltaRuleMixer):
    """W_o (RMSNorm(y) * sigmoid(x W_g1 W_g2)), the norm over each head."""

    Config = KDAConfig
    card = Card(
        "Kimi Delta Attention: a delta rule with a decay a key channel",
        "arXiv:2510.26692",
        "transformers: KimiLinearDeltaAttention",
        (*FLA, "causal_conv1d"),
    )
    tensor_parallel = {
        "wq": Split.COLUMN,
        "wk": Split.COLUMN,
        "wv": Split.COLUMN,
        "conv_q": Split.COLUMN,
        "conv_k": Split.COLUMN,
        "conv_v": Split.COLUMN,
        "wa1": Split.SHARED,
        "wa2": Split.COLUMN,
        "wb": Split.COLUMN,
        "wg1": Split.SHARED,
        "wg2": Split.COLUMN,
        "wo": Split.ROW,
        "head": Split.REPLICATED,
        "a_log_H": Split.PER_HEAD,
        "dt_bias": Split.PER_HEAD,
        "norm_K": Split.SHARED,
    }
    float8 = frozenset({"wq", "wk", "wv", "wo"})  # the rest is narrow, or in an exponent
    config: KDAConfig

    def __init__(self, config: KDAConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        D, H, K = shape.d_model, config.n_heads, config.channels(shape.d_model)
        self.K, rank = K, config.rank or K
        self.state_shape = (H, K, K)
        self.wq, self.wk, self.wv = (Linear(D, H * K, bias=False) for _ in range(3))
        self.conv_q, self.conv_k, self.conv_v = (ShortConv(H * K, config.conv_size, bias=False, backend=config.backend) for _ in range(3))
        self.wa1, self.wg1 = Linear(D, rank, bias=False), Linear(D, rank, bias=False)
        self.wa2, self.wg2 = Linear(rank, H * K, bias=False), Linear(rank, H * K, bias=False)
        self.wb, self.wo = Linear(D, H, bias=False), Linear(H * K, D, bias=False)
        self.head = HeadParams({"a_log_H": (H,), "dt_bias": (H, K)})
        self.norm_K = nn.Parameter(torch.empty(K))

    @staticmethod
    def streams(config: KDAConfig, shape: ModelShape) -> Mapping[str, Stream]:
        return {name: Stream(Side.QUERY, config.n_heads) for name in ("q", "k", "v", "step", "beta")}

    @staticmethod
    def cost(config: KDAConfig, shape: ModelShape, layer: int) -> Cost:
        D, H, K = shape.d_model, config.n_heads, config.channels(shape.d_model)
        rank = config.rank or K
        cost = linear_cost(D, 3 * H * K + 2 * rank + H) + linear_cost(2 * rank, H * K) + linear_cost(H * K, D)
        cost += ShortConv.cost(3 * H * K, config.conv_size, bias=False)
        return cost + Cost(H + H * K + K, FLOPS_OF_STATE * H * K * K, 4 * H * K * K)

    def reset_parameters(self, init: Init) -> None:
        """Linears by the scheme, wo as residual output, convolutions their own; A ~ U(1, 16), dt_bias the inverse softplus of steps
        log-uniform in [1e-3, 0.1]; the norm's gain 1."""
        for linear in (self.wq, self.wk, self.wv, self.wa1, self.wa2, self.wb, self.wg1, self.wg2):
            init.linear(linear)
        init.residual_output(self.wo, self.layer)
        for conv in (self.conv_q, self.conv_k, self.conv_v):
            conv.reset_parameters(init)
        init.fill(self.head, "a_log_H", partial(log_uniform, 1.0, 16.0))
        init.fill(self.head, "dt_bias", step_biases)
        init.constant(self, "norm_K", 1.0)

    def project(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        """q, k, v and step, before its functions, [B, T, H, K]; beta, before its sigmoid, [B, T, H, 1]."""
        q, k, v = (
            F.silu(conv(linear(x_BTD), seq)).unflatten(-1, (-1, self.K))
            for linear, conv in ((self.wq, self.conv_q), (self.wk, self.conv_k), (self.wv, self.conv_v))
        )
        step = self.wa2(self.wa1(x_BTD)).unflatten(-1, (-1, self.K))
        return {"q": q, "k": k, "v": v, "step": step, "beta": self.wb(x_BTD).unsqueeze(-1)}, carry

    def merge(self, y_BTHK: Tensor, x_BTD: Tensor) -> Tensor:
        """Gated RMSNorm a head, then the output projection: [B, T, D]."""
        out: Tensor = self.wo(gated_norm(y_BTHK, local(self.norm_K), self.wg2(self.wg1(x_BTD)), torch.sigmoid, EPS))
        return out
