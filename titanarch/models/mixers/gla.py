"""Gated linear attention: each key channel decays by a gate of its own that the token sets (arXiv:2312.06635).

S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t / sqrt(K), alpha = sigmoid(W_2 W_1 x + b)^(1/16). The output is
W_o (RMSNorm of each head(y) * silu(x W_g)). There is no rotation.

Shapes: B rows, T tokens, D model dim, H heads, K key dim, V value dim, R rank of the gate.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from titanarch.config.errors import ConfigError
from titanarch.contract.card import Card
from titanarch.contract.cost import Cost, linear_cost, mean_visible_keys
from titanarch.contract.init import Init
from titanarch.contract.layers import Linear, local
from titanarch.contract.mixer import MixerConfig, MixResult, RecurrentMixer, State, Streams, Transition, mixer
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import ContextParallel, Side, Split, Stream
from titanarch.ops.decay_recurrence import decay_recurrence, decay_transition
from titanarch.ops.recurrence_backend import chosen, why_not

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class LinearAttentionConfig(MixerConfig):
    """What mixers with keys and values of two widths take; ``n_heads`` comes from [model] unless given here."""

    n_heads: Positive = Field(description="heads")
    expand_k: PositiveFloat = Field(description="width of all keys / d_model")
    expand_v: PositiveFloat = Field(description="width of all values / d_model")
    norm_eps: PositiveFloat = Field(1e-5, description="added to the mean square in the norm of each head")
    chunk_size: Positive = Field(64, description="tokens computed at once; the result does not depend on it")
    backend: Literal["auto", "reference", "fla"] = Field(
        "auto",
        description="who computes the recurrence: plain PyTorch (reference), or on CUDA the kernels of a package; auto: as installed",
    )

    def channels(self, d_model: int) -> tuple[int, int]:
        """Key and value channels of a head; a ConfigError where the sizes do not fit."""
        found = []
        for name, expansion in (("expand_k", self.expand_k), ("expand_v", self.expand_v)):
            exact = expansion * d_model / self.n_heads
            if abs(exact - round(exact)) > 1e-6 or round(exact) < 1:
                raise ConfigError(
                    f"{self.kind}: {name} ({expansion}) x d_model ({d_model}) / n_heads ({self.n_heads}) is {exact:g} channels a head; "
                    "change one of them so that it is whole"
                )
            found.append(round(exact))
        return found[0], found[1]

    def recurrence_cost(self, shape: ModelShape) -> Cost:
        """Products with the tokens that each sees in its chunk, and with the state, which is of fp32."""
        K, V = self.channels(shape.d_model)
        visible = mean_visible_keys(min(self.chunk_size, shape.seq_len))
        return Cost(0, self.n_heads * (2 * visible * (K + V) + 4 * K * V), 4 * self.n_heads * K * V)


class GLAConfig(LinearAttentionConfig):
    """[model.mixers.gla]; ``n_heads`` comes from [model] unless given here."""

    expand_k: PositiveFloat = Field(0.5, description="width of all keys / d_model")
    expand_v: PositiveFloat = Field(1.0, description="width of all values / d_model")
    gate_low_rank_dim: Positive = Field(16, description="rank of the gate's projection, channels")
    gate_logit_normalizer: PositiveFloat = Field(16.0, description="the gate is sigmoid to the power of 1 / this")


@mixer("gla")
class GLA(RecurrentMixer):
    """See the head of this file. Gates and state are of fp32, or fp64 where the streams are."""

    Config = GLAConfig
    card = Card(
        title="Gated linear attention: a gate a key channel",
        paper="arXiv:2312.06635",
        reference="the recurrence token by token, written apart",
        kernels=("fla",),
    )
    context_parallel = (ContextParallel.STATE, ContextParallel.HEADS)
    tensor_parallel = {
        "wq": Split.COLUMN,
        "wk": Split.COLUMN,
        "wv": Split.COLUMN,
        "wg": Split.COLUMN,
        "gate_down": Split.SHARED,
        "gate_up": Split.COLUMN,
        "gain_V": Split.SHARED,
        "wo": Split.ROW,
    }
    float8 = frozenset({"wq", "wk", "wv", "wg", "wo"})
    config: GLAConfig

    def __init__(self, config: GLAConfig, shape: ModelShape, layer: int) -> None:
        """Raises ConfigError where the sizes do not fit."""
        super().__init__(config, shape, layer)
        D, H, R = shape.d_model, config.n_heads, config.gate_low_rank_dim
        self.key_dim, self.value_dim = config.channels(D)
        keys, values = H * self.key_dim, H * self.value_dim
        self.wq, self.wk, self.wv, self.wg = (Linear(D, width, bias=False) for width in (keys, keys, values, values))
        self.gate_down, self.gate_up = Linear(D, R, bias=False), Linear(R, keys, bias=True)
        self.gain_V = nn.Parameter(torch.empty(self.value_dim))
        self.wo = Linear(values, D, bias=False)

    @staticmethod
    def streams(config: GLAConfig, shape: ModelShape) -> Mapping[str, Stream]:
        return dict.fromkeys(("q", "k", "v", "gate"), Stream(Side.QUERY, config.n_heads))

    @staticmethod
    def cost(config: GLAConfig, shape: ModelShape, layer: int) -> Cost:
        D, H, R = shape.d_model, config.n_heads, config.gate_low_rank_dim
        K, V = config.channels(D)
        widths = [(D, H * K), (D, H * K), (D, H * V), (D, H * V), (D, R), (H * V, D)]
        cost = sum((linear_cost(d_in, d_out) for d_in, d_out in widths), linear_cost(R, H * K, bias=True))
        return cost + Cost(parameters=V) + config.recurrence_cost(shape)

    def reset_parameters(self, init: Init) -> None:
        """Linears by the scheme, wo as residual output; gains 1."""
        for linear in (self.wq, self.wk, self.wv, self.wg, self.gate_down, self.gate_up):
            init.linear(linear)
        init.residual_output(self.wo, self.layer)
        init.constant(self, "gain_V", 1.0)

    def why_not_on(self, device_type: str, *, compiled: bool) -> str:
        return why_not(self.config.backend, device_type, compiled=compiled)

    def project(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        """q, k [B, T, H, K]; v [B, T, H, V]; the gate's logits [B, T, H, K]."""
        q, k, gate = (y.unflatten(-1, (-1, self.key_dim)) for y in (self.wq(x_BTD), self.wk(x_BTD), self.gate_up(self.gate_down(x_BTD))))
        return {"q": q, "k": k, "v": self.wv(x_BTD).unflatten(-1, (-1, self.value_dim)), "gate": gate}, carry

    @staticmethod
    def mix(
        config: GLAConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: State | None = None
    ) -> MixResult:
        """y [B, T, H, V]; the state is [B, H, K, V]."""
        q, v = streams["q"], streams["v"]
        y, last = decay_recurrence(
            q * q.shape[-1] ** -0.5,
            streams["k"],
            v,
            _log_decay(config, streams["gate"]),
            starts_BT=starts(seq.query),
            state=None if state is None else state["recurrent"],
            chunk_size=config.chunk_size,
            backend=chosen(config.backend, v, ("fla",)),
        )
        return MixResult(y.to(v.dtype), state={"recurrent": last})

    @staticmethod
    def transition(config: GLAConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> Transition:
        """decay [B, H, K, 1], state [B, H, K, V]."""
        log_decay = _log_decay(config, streams["gate"])
        return Transition(*decay_transition(streams["k"], streams["v"], log_decay, starts_BT=starts(seq.query)))

    def merge(self, y_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """The norm of each head, the gate, the output projection: [B, T, D]."""
        y = F.rms_norm(y_BTHV, (self.value_dim,), local(self.gain_V), eps=self.config.norm_eps).flatten(2)
        out: Tensor = self.wo(y * F.silu(self.wg(x_BTD)))
        return out

    def initial_state(self, n_rows: int, dtype: torch.dtype, device: torch.device) -> State:
        """Zeros, fp32 [B, H, K, V]."""
        return {"recurrent": torch.zeros(n_rows, self.config.n_heads, self.key_dim, self.value_dim, device=device)}


def _log_decay(config: GLAConfig, gate_BTHK: Tensor) -> Tensor:
    """At least fp32."""
    return F.logsigmoid(gate_BTHK.to(torch.promote_types(gate_BTHK.dtype, torch.float32))) / config.gate_logit_normalizer


def starts(here: SequenceInfo) -> Tensor | None:
    """Where documents start, [B, T]; rows of one document have no state before them to forget."""
    return here.position_BT == 0 if here.packed else None
