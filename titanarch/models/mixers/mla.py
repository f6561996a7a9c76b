"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434; DeepSeek-V3, arXiv:2412.19437): keys and values of all heads come
from one narrow latent a token.

    c = RMSNorm(x W_c),    r = turn(x W_r)                          what is cached: R + P channels a token
    k_h = (c W_kh, r),     v_h = c W_vh                             a key's last P channels are shared by all heads
    q_h = (x W_qh, turn(x W_rh))                                    or from a normed query latent in place of x

with the logits q_h . k_h / sqrt(N + P). Keys and values are made of the latent in ``mix``, so context parallelism moves the latent and
the rotary key alone, and each process makes those of its own heads. Decoding never makes them: q_h W_kh reads the latent itself,

    q_h . k_h = (q_h W_kh^T) . c + turned part,        y_h = (sum_j p_j c_j) W_vh

so a step costs one key head of R + P channels.

Shapes: B rows, T queries, S keys, D model dim, H heads, R latent channels, Q query latent channels, N channels of a query and key that do
not turn, P that do, V of a value.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from titanarch.contract.card import Card
from titanarch.contract.cost import Cost, linear_cost, mean_visible_keys
from titanarch.contract.init import Init
from titanarch.contract.layers import Linear, local
from titanarch.contract.mixer import MixResult, State, Streams, mixer
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import Side, Split, Stream
from titanarch.models.mixers.softmax import Positive, SoftmaxConfig, SoftmaxMixer, attend, with_cache

EPS = 1e-6
"""Of the norms of latents."""


class Sizes(NamedTuple):
    """Channels a head: N and P of a query and key, V of a value. R, Q: of the latents; Q 0 where queries have none."""

    N: int
    P: int
    V: int
    R: int
    Q: int


class MLAConfig(SoftmaxConfig):
    """[model.mixers.mla]; unset sizes keep the proportions of DeepSeek-V2: latent 4, rotary key 1/2 of a head's channels."""

    head_dim: Positive | None = Field(None, description="channels of a query and key that do not turn; unset: d_model / n_heads")
    rotary_dim: Positive | None = Field(None, description="channels of the rotary key, shared by all heads; unset: head_dim / 2")
    value_dim: Positive | None = Field(None, description="channels of a head's value; unset: head_dim")
    kv_rank: Positive | None = Field(None, description="channels of the latent of keys and values; unset: 4 head_dim")
    q_rank: Positive | None = Field(None, description="channels of the latent of queries; unset: queries are projected from x")

    def sizes(self, d_model: int) -> Sizes:
        """A ValueError where the model's width does not give them."""
        if self.head_dim is None and d_model % self.n_heads:
            raise ValueError(
                f"{self.kind}: d_model ({d_model}) is not a multiple of n_heads ({self.n_heads}); change one, or give head_dim"
            )
        N = self.head_dim or d_model // self.n_heads
        if self.rotary_dim is None and N % 2:
            raise ValueError(f"{self.kind}: half of head_dim ({N}) is no integer; give rotary_dim")
        return Sizes(N, self.rotary_dim or N // 2, self.value_dim or N, self.kv_rank or 4 * N, self.q_rank or 0)

    def check_sizes(self, d_model: int) -> None:
        self.sizes(d_model)


@mixer("mla")
class MLA(SoftmaxMixer):
    """Attention whose keys and values come from a latent; biases by distance, windows and the rest as in attention."""

    Config = MLAConfig
    card = Card(
        "Multi-head latent attention: keys and values from one cached latent, a rotary key shared by all heads",
        "arXiv:2405.04434, 2412.19437",
        "transformers DeepseekV3Attention",
    )
    tensor_parallel = {
        **SoftmaxMixer.tensor_parallel,
        "wq": Split.COLUMN,
        # Latents are made alike everywhere and read by local heads, so what made them has a part of its gradient.
        "wq_down": Split.SHARED,
        "q_gain_Q": Split.SHARED,
        "wq_up": Split.COLUMN,
        "wkv_down": Split.SHARED,
        "kv_gain_R": Split.SHARED,
        "wk_turned": Split.SHARED,
        # Read in mix, where their rows are cut by head.
        "wk_up": Split.REPLICATED,
        "wv_up": Split.REPLICATED,
        "k_up": Split.PER_HEAD,
        "v_up": Split.PER_HEAD,
    }
    float8 = frozenset({"wq", "wq_down", "wq_up", "wkv_down", "wg", "wo"})
    config: MLAConfig

    def __init__(self, config: MLAConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        D, H = shape.d_model, config.n_heads
        self.sizes = config.sizes(D)
        N, P, V, R, Q = self.sizes
        if Q:
            self.wq_down = Linear(D, Q, bias=False)
            self.q_gain_Q = nn.Parameter(torch.empty(Q))
            self.wq_up = Linear(Q, H * (N + P), bias=False)
        else:
            self.wq = Linear(D, H * (N + P), bias=False)
        self.wkv_down = Linear(D, R, bias=False)
        self.kv_gain_R = nn.Parameter(torch.empty(R))
        self.wk_turned = Linear(D, P, bias=False)
        self.wk_up = Linear(R, H * N, bias=False)
        self.wv_up = Linear(R, H * V, bias=False)
        self.build_ends(shape, logit_channels=N + P, turned_channels=P, d_out=H * V)

    @staticmethod
    def streams(config: MLAConfig, shape: ModelShape) -> Mapping[str, Stream]:
        shared = Stream(Side.KEY, 1)
        return {"q": Stream(Side.QUERY, config.n_heads), "latent": shared, "k_turned": shared}

    @staticmethod
    def cost(config: MLAConfig, shape: ModelShape, layer: int) -> Cost:
        """The FLOPs are those of training, which makes every token's keys and values once."""
        D, H = shape.d_model, config.n_heads
        N, P, V, R, Q = config.sizes(D)
        cost = linear_cost(D, Q) + linear_cost(Q, H * (N + P)) + Cost(parameters=Q) if Q else linear_cost(D, H * (N + P))
        cost += linear_cost(D, R) + linear_cost(D, P) + linear_cost(R, H * N) + linear_cost(R, H * V) + Cost(parameters=R)
        cost += SoftmaxMixer.ends_cost(config, shape, layer, turned_channels=P, d_out=H * V)
        cached = min(shape.seq_len, config.window or shape.seq_len)
        return cost + Cost(
            forward_flops_per_token=2.0 * H * (N + P + V) * mean_visible_keys(shape.seq_len, config.window),
            state_bytes=2 * cached * (R + P),
        )

    def reset_parameters(self, init: Init) -> None:
        """Linears by the scheme, wo as residual output; gains 1; sinks N(0, 0.02^2); positions their own."""
        for linear in (self.wkv_down, self.wk_turned, self.wk_up, self.wv_up):
            init.linear(linear)
        for linear in (self.wq_down, self.wq_up) if self.sizes.Q else (self.wq,):
            init.linear(linear)
        if self.sizes.Q:
            init.constant(self, "q_gain_Q", 1.0)
        init.constant(self, "kv_gain_R", 1.0)
        self.reset_ends(init)

    def project(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        """q [B, T, H, N + P]; latent [B, T, 1, R]; k_turned [B, T, 1, P]."""
        N, P, _, R, Q = self.sizes
        flat_q = self.wq_up(F.rms_norm(self.wq_down(x_BTD), (Q,), local(self.q_gain_Q), eps=EPS)) if Q else self.wq(x_BTD)
        q_BTHN, q_BTHP = flat_q.unflatten(-1, (-1, N + P)).split((N, P), dim=-1)
        k_BT1P = self.wk_turned(x_BTD).unsqueeze(2)
        for position in self.relative_positions():
            q_BTHP, k_BT1P = position.rotate(q_BTHP, k_BT1P, seq.position_BT)
        latent_BTR = F.rms_norm(self.wkv_down(x_BTD), (R,), local(self.kv_gain_R), eps=EPS)
        return {"q": torch.cat((q_BTHN, q_BTHP), dim=-1), "latent": latent_BTR.unsqueeze(2), "k_turned": k_BT1P}, carry

    def head_params(self, seq: SequenceInfo, carry: Carry) -> tuple[Mapping[str, Tensor], Carry]:
        """As attention; k_up [H N, R] and v_up [H V, R] in the dtype of compute."""
        params, carry = super().head_params(seq, carry)
        return {**params, "k_up": self.wk_up.weight, "v_up": self.wv_up.weight}, carry

    @staticmethod
    def mix(
        config: MLAConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: State | None = None
    ) -> MixResult:
        """Attention of the local heads: y [B, T, H, V]. With a state, the latent and the rotary key are appended to its cache."""
        q, k_up, v_up = streams["q"], head_params["k_up"], head_params["v_up"]
        (latent_BS1R, k_BS1P), state = with_cache(streams, state, ("latent", "k_turned"))
        H, P = q.shape[2], k_BS1P.shape[-1]
        if state is None:
            k_BSHN, v_BSHV = (F.linear(latent_BS1R[:, :, 0], up).unflatten(-1, (H, -1)) for up in (k_up, v_up))
            k = torch.cat((k_BSHN, k_BS1P.expand(-1, -1, H, -1)), dim=-1)
            return MixResult(*attend(config, q, k, v_BSHV, head_params, seq))
        q_BTHN, q_BTHP = q.split((q.shape[-1] - P, P), dim=-1)
        q_BTHR = torch.einsum("bthn,hnr->bthr", q_BTHN, k_up.unflatten(0, (H, -1)))
        k_BS1K = torch.cat((latent_BS1R, k_BS1P), dim=-1)
        y_BTHR, lse = attend(
            config, torch.cat((q_BTHR, q_BTHP), dim=-1), k_BS1K, latent_BS1R, head_params, seq, scale=q.shape[-1] ** -0.5
        )  # fmt: skip
        return MixResult(torch.einsum("bthr,hvr->bthv", y_BTHR, v_up.unflatten(0, (H, -1))), lse, state)

    def initial_state(self, n_rows: int, dtype: torch.dtype, device: torch.device) -> State:
        """An empty cache: latent [B, 0, 1, R], rotary key [B, 0, 1, P]."""
        sizes = {"latent": self.sizes.R, "k_turned": self.sizes.P}
        return {name: torch.empty(n_rows, 0, 1, channels, dtype=dtype, device=device) for name, channels in sizes.items()}
