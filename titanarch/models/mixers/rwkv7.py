"""RWKV-7 time mix (arXiv:2503.14456; BlinkDL/RWKV-LM, RWKV-v7, whose initial weights are kept).

With x~_i = x_t + (x_{t-1} - x_t) mu_i for each of r, w, k, v, a, g:

    log w = -e^{-1/2} sigmoid(w_0 + tanh(x~_w W_1) W_2),  a = sigmoid(a_0 + x~_a A_1 A_2),  g = sigmoid(x~_g G_1) G_2
    v = v + (v of the first layer - v) sigmoid(v_0 + x~_v V_1 V_2)
    kappa = unit(k k_k),  k' = k (1 + (a - 1) k_a)
    S_t = S_{t-1} (diag(w_t) - kappa_t (a_t kappa_t)^T) + v_t k'_t^T
    y = LayerNorm of each head(S r) + (sum of r r_k k') v,  out = W_o (y g)

The published optimizer gives w_0 twice the learning rate of all others: ``decay_lr_group`` names its group.

Shapes: B rows, T tokens, D model dim, H heads, K channels a head, R rank.
"""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from titanarch.config.errors import ConfigError
from titanarch.contract.card import Card
from titanarch.contract.cost import Cost, linear_cost
from titanarch.contract.init import Init
from titanarch.contract.layers import HeadParams, Linear, local
from titanarch.contract.mixer import MixerConfig, MixResult, State, Streams, Transition, mixer
from titanarch.contract.roles import VECTOR, Kind, Role
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import ContextParallel, Side, Split, Stream
from titanarch.models.mixers.delta_rule import MatrixStateMixer, divided_width
from titanarch.models.mixers.recurrent import BACKEND, FLA, Backend, incoming
from titanarch.models.mixers.rwkv7_init import decay_bias, gain_of_layer, linear_ramp, orthogonal, rate_bias, shift_ramps
from titanarch.ops.delta_recurrence import diagonal_plus_low_rank, diagonal_plus_low_rank_transition
from titanarch.ops.recurrence_backend import chosen

Positive = Annotated[int, Field(gt=0)]

FLOPS_OF_STATE = 8
"""A token, key channel and value channel: the state is read along kappa, corrected, written and read, a multiply-add each."""

SHIFTED = "rwkvag"
"""Rows of ``shift_SD``."""


class RWKV7Config(MixerConfig):
    """[model.mixers.rwkv7]; ``n_heads`` comes from [model] unless given here. Ranks left out grow as sqrt(d_model), in steps of 32."""

    n_heads: Positive = Field(description="heads, each with a state; 64 channels each as published, d_model / n_heads in general")
    decay_rank: Positive | None = Field(None, description="rank of the map that makes decays; unset: about 2.5 sqrt(d_model)")
    rate_rank: Positive | None = Field(None, description="rank of the map that makes in-context learning rates; unset: as decay_rank")
    value_rank: Positive | None = Field(None, description="rank of the map that mixes in first values; unset: about 1.7 sqrt(d_model)")
    gate_rank: Positive | None = Field(None, description="rank of the map that makes the output gate; unset: about 5 sqrt(d_model)")
    decay_lr_group: str | None = Field(
        None, description="learning-rate group of w_0 in optimizer.lr_multipliers; published runs give it 2.0; unset: as all others"
    )
    backend: Backend = Field("auto", description=BACKEND)

    def head_dim(self, d_model: int) -> int:
        """K; ConfigError where the model's width does not give at least two channels a head."""
        K = divided_width("rwkv7", d_model, self.n_heads)
        if K < 2:
            raise ConfigError(f"rwkv7: d_model ({d_model}) over n_heads ({self.n_heads}) leaves {K} channel a head; use fewer heads")
        return K

    def ranks(self, d_model: int) -> tuple[int, int, int, int]:
        """Of decay, rate, value and gate."""

        def near(factor: float) -> int:
            return max(32, 32 * round(factor * math.sqrt(d_model) / 32))

        w = self.decay_rank or near(2.5)
        return w, self.rate_rank or near(2.5), self.value_rank or near(1.7), self.gate_rank or near(5.0)


class Factor(Linear):
    """One of two matrices of a low-rank map; no weight decay, as published, and too narrow for Muon."""

    roles: ClassVar[dict[str, Role]] = {"weight": Role(Kind.HIDDEN, decay=False), "bias": VECTOR}


class TimeMixParams(HeadParams):
    """Those of each head; w_0 may have a learning-rate group of its own."""

    roles: dict[str, Role] = {}


@mixer("rwkv7")
class RWKV7(MatrixStateMixer):
    """Everything from the recurrence to the gate happens in ``mix``: it reads parameters of each head."""

    Config = RWKV7Config
    card = Card(
        "RWKV-7 time mix: a state with vector decay, rewritten along a learned direction",
        "arXiv:2503.14456",
        "a loop over tokens written from the paper's equations",
        FLA,
    )
    context_parallel = (ContextParallel.STATE, ContextParallel.HEADS)
    tensor_parallel = {
        **dict.fromkeys(("wr", "wk", "wv", "w2", "a2", "v2", "g2"), Split.COLUMN),
        **dict.fromkeys(("w1", "a1", "v1", "g1", "shift_SD"), Split.SHARED),
        **dict.fromkeys(("w0_HK", "a0_HK", "k_k_HK", "k_a_HK", "r_k_HK", "gain_HK", "bias_HK"), Split.PER_HEAD),
        "wo": Split.ROW,
        "head": Split.REPLICATED,
    }
    float8 = frozenset({"wr", "wk", "wv", "wo"})
    fp32 = frozenset({"head"})
    config: RWKV7Config

    def __init__(self, config: RWKV7Config, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        D, H, K = shape.d_model, config.n_heads, config.head_dim(shape.d_model)
        self.shape, self.K = shape, K
        self.state_shape = (H, K, K)
        self.is_first = shape.is_first_of_its_name(layer)
        w, a, v, g = config.ranks(D)
        self.wr, self.wk, self.wv, self.wo = (Linear(D, D, bias=False) for _ in range(4))
        self.w1, self.a1, self.g1 = (Factor(D, rank, bias=False) for rank in (w, a, g))
        self.w2, self.a2, self.g2 = (Factor(rank, D, bias=False) for rank in (w, a, g))
        if not self.is_first:
            self.v1, self.v2 = Factor(D, v, bias=False), Factor(v, D, bias=True)
        self.shift_SD = nn.Parameter(torch.empty(len(SHIFTED), D))
        names = ("w0_HK", "a0_HK", "k_k_HK", "k_a_HK", "r_k_HK", "gain_HK", "bias_HK")
        self.head = TimeMixParams(dict.fromkeys(names, (H, K)))
        if config.decay_lr_group is not None:
            self.head.roles = {"w0_HK": VECTOR.with_lr_group(config.decay_lr_group)}

    @staticmethod
    def streams(config: RWKV7Config, shape: ModelShape) -> Mapping[str, Stream]:
        return {name: Stream(Side.QUERY, config.n_heads) for name in SHIFTED}

    @staticmethod
    def cost(config: RWKV7Config, shape: ModelShape, layer: int) -> Cost:
        """``state_bytes``: the fp32 state, and the token before in 2 bytes a channel."""
        D, K = shape.d_model, config.head_dim(shape.d_model)
        w, a, v, g = config.ranks(D)
        cost = linear_cost(D, 4 * D) + linear_cost(w + a + g, 2 * D)
        if not shape.is_first_of_its_name(layer):
            cost += linear_cost(v, 2 * D) + Cost(D)
        return cost + Cost(len(SHIFTED) * D + 7 * D, FLOPS_OF_STATE * D * K, 4 * D * K + 2 * D)

    def reset_parameters(self, init: Init) -> None:
        """As published, with l the block of L: wr, wv orthogonal; wk orthogonal times 0.1; wo 0; of each low-rank map the first factor 0,
        the second orthogonal times 0.1 (times sqrt(rows / columns) above 1); shifts 1 - (i/D)^p with p falling with depth; w_0 a ramp from
        -6 to 0, + 0.5 + 2.5 zigzag over the head; a_0 -0.19 + 0.3 zigzag + 0.4 ramp; v_0 0.73 - 0.4 ramp; k_k 0.71 - 0.1 ramp; k_a 1.02;
        r_k -0.04; the norm's gain ((l + 1) / L)^0.7, its bias 0."""
        L, head, ramp = self.shape.n_layers, self.head, linear_ramp
        for linear, gain in ((self.wr, 1.0), (self.wv, 1.0), (self.wk, 0.1)):
            init.fill(linear, "weight", orthogonal(gain))
        init.constant(self.wo, "weight", 0.0)
        for first, second in ((self.w1, self.w2), (self.a1, self.a2), (self.g1, self.g2)):
            init.constant(first, "weight", 0.0)
            init.fill(second, "weight", orthogonal(0.1, transposed=True))
        if not self.is_first:
            init.constant(self.v1, "weight", 0.0)
            init.fill(self.v2, "weight", orthogonal(0.1, transposed=True))
            init.fill(self.v2, "bias", lambda shape, _: 0.73 - 0.4 * ramp(shape))
        init.fill(self, "shift_SD", shift_ramps(self.layer, L))
        init.fill(head, "w0_HK", decay_bias(self.layer, L))
        init.fill(head, "a0_HK", rate_bias)
        init.fill(head, "k_k_HK", lambda shape, _: 0.71 - 0.1 * ramp(shape))
        for name, value in (("k_a_HK", 1.02), ("r_k_HK", -0.04), ("gain_HK", gain_of_layer(self.layer, L)), ("bias_HK", 0.0)):
            init.constant(head, name, value)

    def project(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        """r, k, v, g [B, T, H, K]; w and a without their bias and function. The first layer's values pass on in the carry."""
        before = seq.previous(x_BTD, 1) - x_BTD
        shifts = local(self.shift_SD)
        x = {name: x_BTD + before * shift_D for name, shift_D in zip(SHIFTED, shifts.unbind(), strict=True)}
        v = self.wv(x["v"])
        passed = f"v_first.{self.shape.layers[self.layer]}"
        if self.is_first:
            carry = carry.with_value(passed, v)
        else:
            v = v + (carry.values[passed] - v) * torch.sigmoid(self.v2(self.v1(x["v"])))
        flat = {
            "r": self.wr(x["r"]),
            "w": self.w2(torch.tanh(self.w1(x["w"]))),
            "k": self.wk(x["k"]),
            "v": v,
            "a": self.a2(self.a1(x["a"])),
            "g": self.g2(torch.sigmoid(self.g1(x["g"]))),
        }
        return {name: value.unflatten(-1, (-1, self.K)) for name, value in flat.items()}, carry

    @staticmethod
    def _operands(streams: Streams, head_params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """k', v, log w, and the two vectors of the correction, [B, T, H, K], in fp32 at least."""
        w0 = head_params["w0_HK"]
        wide = torch.promote_types(w0.dtype, streams["k"].dtype)
        k, v, w, a = (streams[name].to(wide) for name in "kvwa")
        log_w = -math.exp(-0.5) * torch.sigmoid(w0 + w)
        a = torch.sigmoid(head_params["a0_HK"] + a)
        kappa = F.normalize(k * head_params["k_k_HK"], dim=-1)
        return k * (1 + (a - 1) * head_params["k_a_HK"]), v, log_w, -kappa, kappa * a

    @staticmethod
    def mix(
        config: RWKV7Config, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: State | None = None
    ) -> MixResult:
        """The recurrence, the norm of each head, the bonus of the token itself, and the gate: [B, T, H, K]."""
        k, v, log_w, a, b = RWKV7._operands(streams, head_params)
        r, starts, before = streams["r"].to(k.dtype), seq.query.starts_BT, incoming(state)
        backend = chosen(config.backend, streams["v"], FLA)
        narrow = v.to(streams["v"].dtype) if backend == "fla" else v
        y, last = diagonal_plus_low_rank(r, k, narrow, log_w, a, b, starts_BT=starts, state=before, backend=backend)
        y = y.to(v.dtype)
        y = F.layer_norm(y, y.shape[-1:], eps=1e-5 * y.shape[-1]) * head_params["gain_HK"] + head_params["bias_HK"]
        y = y + (r * k * head_params["r_k_HK"]).sum(-1, keepdim=True) * v
        return MixResult((y * streams["g"]).to(streams["v"].dtype), state={"recurrent": last})

    @staticmethod
    def transition(config: RWKV7Config, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> Transition:
        """decay M [B, H, K, K], state [B, H, K, K]."""
        operands = RWKV7._operands(streams, head_params)
        return Transition(*diagonal_plus_low_rank_transition(*operands, starts_BT=seq.query.starts_BT))

    def merge(self, y_BTHK: Tensor, x_BTD: Tensor) -> Tensor:
        """The output projection: [B, T, D]."""
        out: Tensor = self.wo(y_BTHK.flatten(2))
        return out
