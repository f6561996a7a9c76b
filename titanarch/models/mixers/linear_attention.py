"""What linear attention with a decaying state shares: S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t / sqrt(K).

Shapes: B rows, T tokens, D model dim, H heads, K key dim, V value dim.
"""

from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from titanarch.config.errors import ConfigError
from titanarch.contract.cost import Cost, linear_cost, mean_visible_keys
from titanarch.contract.init import Init
from titanarch.contract.layers import Linear
from titanarch.contract.mixer import MixerConfig, MixResult, State, Streams, Transition
from titanarch.contract.sequence import MixSequence
from titanarch.contract.shape import ModelShape
from titanarch.contract.split import ContextParallel, Split
from titanarch.models.mixers.recurrent import BACKEND, FLA, Backend, KernelMixer, incoming
from titanarch.ops.decay_recurrence import decay_recurrence, decay_transition
from titanarch.ops.recurrence_backend import chosen

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class LinearAttentionConfig(MixerConfig):
    """What mixers with keys and values of two widths take; ``n_heads`` comes from [model] unless given here."""

    n_heads: Positive = Field(description="heads")
    expand_k: PositiveFloat = Field(description="width of all keys / d_model")
    expand_v: PositiveFloat = Field(description="width of all values / d_model")
    norm_eps: PositiveFloat = Field(1e-5, description="added to the mean square in the norm of each head")
    chunk_size: Positive = Field(64, description="tokens computed at once; the result does not depend on it")
    backend: Backend = Field("auto", description=BACKEND)

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


class LinearAttention(KernelMixer):
    """W_o (RMSNorm of each head(y) * silu(x W_g)). Decays and state are of fp32, or fp64 where the streams are."""

    context_parallel = (ContextParallel.STATE, ContextParallel.HEADS)
    tensor_parallel = {**dict.fromkeys(("wq", "wk", "wv", "wg"), Split.COLUMN), "wo": Split.ROW}
    float8 = frozenset({"wq", "wk", "wv", "wg", "wo"})
    config: LinearAttentionConfig

    def __init__(self, config: LinearAttentionConfig, shape: ModelShape, layer: int) -> None:
        """Raises ConfigError where the sizes do not fit."""
        super().__init__(config, shape, layer)
        D, H = shape.d_model, config.n_heads
        self.key_dim, self.value_dim = config.channels(D)
        self.state_shape = (H, self.key_dim, self.value_dim)
        keys, values = H * self.key_dim, H * self.value_dim
        self.wq, self.wk, self.wv, self.wg = (Linear(D, width, bias=False) for width in (keys, keys, values, values))
        self.wo = Linear(values, D, bias=False)

    @staticmethod
    def cost(config: Any, shape: ModelShape, layer: int) -> Cost:
        """The projections; products with the tokens that each sees in its chunk, and with the state, which is of fp32."""
        D, H = shape.d_model, config.n_heads
        K, V = config.channels(D)
        visible = mean_visible_keys(min(config.chunk_size, shape.seq_len))
        cost = linear_cost(D, 2 * H * (K + V)) + linear_cost(H * V, D)
        return cost + Cost(0, H * (2 * visible * (K + V) + 4 * K * V), 4 * H * K * V)

    def reset_parameters(self, init: Init) -> None:
        """Linears by the scheme, wo as residual output."""
        for linear in (self.wq, self.wk, self.wv, self.wg):
            init.linear(linear)
        init.residual_output(self.wo, self.layer)

    def gated(self, y_BTHV: Tensor, x_BTD: Tensor, gain_V: Tensor | None = None) -> Tensor:
        """The norm of each head, the gate, the output projection: [B, T, D]."""
        y = F.rms_norm(y_BTHV, (self.value_dim,), gain_V, eps=self.config.norm_eps).flatten(2)
        out: Tensor = self.wo(y * F.silu(self.wg(x_BTD)))
        return out


def mix_decayed(config: LinearAttentionConfig, streams: Streams, log_decay: Tensor, seq: MixSequence, state: State | None) -> MixResult:
    """y [B, T, H, V] and the state [B, H, K, V], given log alpha, [B, T, H] or [B, T, H, K]."""
    q, v = streams["q"], streams["v"]
    y, last = decay_recurrence(
        q * q.shape[-1] ** -0.5,
        streams["k"],
        v,
        log_decay,
        starts_BT=seq.query.starts_BT,
        state=incoming(state),
        chunk_size=config.chunk_size,
        backend=chosen(config.backend, v, FLA),
    )
    return MixResult(y.to(v.dtype), state={"recurrent": last})


def decayed_transition(streams: Streams, log_decay: Tensor, seq: MixSequence) -> Transition:
    """decay [B, H, 1, 1] or [B, H, K, 1], state [B, H, K, V]."""
    return Transition(*decay_transition(streams["k"], streams["v"], log_decay, starts_BT=seq.query.starts_BT))
