"""Gated DeltaNet (arXiv:2412.06464): a recurrence with a decaying, error-correcting state.

    S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,    y_t = S_t q_t / sqrt(K)

with alpha = exp(-A softplus(x W_a + bias)) and beta = sigmoid(x W_b) a token and head; q, k and v pass a short convolution and SiLU,
q and k are of unit length. Value heads may outnumber key heads, as in Qwen3-Next.

Shapes: B rows, T tokens, D model dim, H heads (of values), G key heads, K key channels a head, V value channels a head.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from titanarch.config.errors import ConfigError
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

EPS = 1e-6
"""Of the norm of a head's output."""


class GatedDeltaNetConfig(MixerConfig):
    """[model.mixers.gated_delta_net]; ``n_heads`` comes from [model] unless given here."""

    n_heads: Positive = Field(description="heads of values, each with a state")
    n_key_heads: Positive | None = Field(None, description="heads of queries and keys, a divisor of n_heads; unset: n_heads")
    head_dim: Positive | None = Field(None, description="key channels a head; unset: d_model / n_heads")
    expand_v: Annotated[float, Field(gt=0)] = Field(2.0, description="value channels / key channels of a head; enlarges the state")
    conv_size: Positive = Field(4, description="taps of the causal convolutions, tokens")
    backend: Backend = Field("auto", description=BACKEND)

    def sizes(self, d_model: int) -> tuple[int, int, int]:
        """G, K, V; ConfigError where they do not divide."""
        G = self.n_key_heads or self.n_heads
        if self.n_heads % G:
            raise ConfigError(f"gated_delta_net: n_heads ({self.n_heads}) is not a multiple of n_key_heads ({G}); use a divisor of n_heads")
        K = self.head_dim or divided_width("gated_delta_net", d_model, self.n_heads)
        V = self.expand_v * K
        if int(V) != V:
            raise ConfigError(
                f"gated_delta_net: expand_v ({self.expand_v}) times {K} key channels a head is {V:g} value channels; "
                "choose an expand_v or head_dim that gives a whole number"
            )
        return G, K, int(V)


@mixer("gated_delta_net")
class GatedDeltaNet(DeltaRuleMixer):
    """W_o (RMSNorm(y) * silu(x W_g)), the norm over each head."""

    Config = GatedDeltaNetConfig
    card = Card(
        "Gated DeltaNet: a delta rule whose state decays",
        "arXiv:2412.06464",
        "transformers: Qwen3NextGatedDeltaNet, torch_recurrent_gated_delta_rule",
        (*FLA, "causal_conv1d"),
    )
    tensor_parallel = {
        "wq": Split.COLUMN("n_key_heads"),
        "wk": Split.COLUMN("n_key_heads"),
        "wv": Split.COLUMN,
        "conv_q": Split.COLUMN("n_key_heads"),
        "conv_k": Split.COLUMN("n_key_heads"),
        "conv_v": Split.COLUMN,
        "wa": Split.COLUMN,
        "wb": Split.COLUMN,
        "wg": Split.COLUMN,
        "wo": Split.ROW,
        "head": Split.REPLICATED,
        "a_log_H": Split.PER_HEAD,
        "dt_bias": Split.PER_HEAD,
        "norm_V": Split.SHARED,
    }
    float8 = frozenset({"wq", "wk", "wv", "wg", "wo"})  # wa and wb are too narrow
    config: GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        D, H = shape.d_model, config.n_heads
        G, self.K, self.V = config.sizes(D)
        self.state_shape = (H, self.V, self.K)
        self.wq, self.wk, self.wv = Linear(D, G * self.K, bias=False), Linear(D, G * self.K, bias=False), Linear(D, H * self.V, bias=False)
        widths = (G * self.K, G * self.K, H * self.V)
        self.conv_q, self.conv_k, self.conv_v = (ShortConv(n, config.conv_size, bias=False, backend=config.backend) for n in widths)
        self.wa, self.wb = Linear(D, H, bias=False), Linear(D, H, bias=False)
        self.wg, self.wo = Linear(D, H * self.V, bias=False), Linear(H * self.V, D, bias=False)
        self.head = HeadParams({"a_log_H": (H,), "dt_bias": (H,)})
        self.norm_V = nn.Parameter(torch.empty(self.V))

    @staticmethod
    def streams(config: GatedDeltaNetConfig, shape: ModelShape) -> Mapping[str, Stream]:
        heads, keys = Stream(Side.QUERY, config.n_heads), Stream(Side.KEY, config.sizes(shape.d_model)[0])
        return {"v": heads, "step": heads, "beta": heads, "q": keys, "k": keys}

    @staticmethod
    def cost(config: GatedDeltaNetConfig, shape: ModelShape, layer: int) -> Cost:
        D, H = shape.d_model, config.n_heads
        G, K, V = config.sizes(D)
        cost = linear_cost(D, 2 * G * K + 2 * H * V + 2 * H) + linear_cost(H * V, D)
        cost += ShortConv.cost(2 * G * K + H * V, config.conv_size, bias=False)
        return cost + Cost(2 * H + V, FLOPS_OF_STATE * H * K * V, 4 * H * K * V)

    def reset_parameters(self, init: Init) -> None:
        """Linears by the scheme, wo as residual output, convolutions their own; A ~ U(0.01, 16), dt_bias the inverse softplus of steps
        log-uniform in [1e-3, 0.1]; the norm's gain 1."""
        for linear in (self.wq, self.wk, self.wv, self.wa, self.wb, self.wg):
            init.linear(linear)
        init.residual_output(self.wo, self.layer)
        for conv in (self.conv_q, self.conv_k, self.conv_v):
            conv.reset_parameters(init)
        init.fill(self.head, "a_log_H", partial(log_uniform, 0.01, 16.0))
        init.fill(self.head, "dt_bias", step_biases)
        init.constant(self, "norm_V", 1.0)

    def project(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        """v [B, T, H, V]; step and beta, before their functions, [B, T, H, 1]; q, k [B, T, G, K]."""
        q, k, v = (
            F.silu(conv(linear(x_BTD), seq)).unflatten(-1, (-1, n))
            for linear, conv, n in ((self.wq, self.conv_q, self.K), (self.wk, self.conv_k, self.K), (self.wv, self.conv_v, self.V))
        )
        return {"v": v, "step": self.wa(x_BTD).unsqueeze(-1), "beta": self.wb(x_BTD).unsqueeze(-1), "q": q, "k": k}, carry

    def merge(self, y_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """Gated RMSNorm a head, then the output projection: [B, T, D]."""
        out: Tensor = self.wo(gated_norm(y_BTHV, local(self.norm_V), self.wg(x_BTD), F.silu, EPS))
        return out
