"""Multi-scale retention: linear attention whose heads forget at fixed rates (RetNet, arXiv:2307.08621).

S_t = gamma_h S_{t-1} + k_t v_t^T, y_t = S_t^T q_t / sqrt(K), gamma_h = 1 - 2^(-5-h) for head h = 0, 1, ...; queries and keys turn with
the position in their document as in the authors' code: channels 2i and 2i + 1 are a pair, frequencies fall evenly in their logarithm
from 1 to 1 / theta, and lengths do not change (no xPos). The output is W_o (norm of each head(y) * silu(x W_g)), the norm without gain.

Shapes: B rows, T tokens, D model dim, H heads, K key dim, V value dim.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from titanarch.config.errors import ConfigError
from titanarch.contract.card import Card
from titanarch.contract.cost import Cost, linear_cost
from titanarch.contract.init import Init
from titanarch.contract.layers import Linear
from titanarch.contract.mixer import MixResult, RecurrentMixer, State, Streams, Transition, mixer
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import ContextParallel, Side, Split, Stream
from titanarch.models.mixers.gla import LinearAttentionConfig, PositiveFloat, starts
from titanarch.models.positions.rotary import turn
from titanarch.ops.decay_recurrence import decay_recurrence, decay_transition
from titanarch.ops.recurrence_backend import chosen, why_not


class RetNetConfig(LinearAttentionConfig):
    """[model.mixers.retnet]; ``n_heads`` comes from [model] unless given here."""

    expand_k: PositiveFloat = Field(1.0, description="width of all keys / d_model")
    expand_v: PositiveFloat = Field(2.0, description="width of all values / d_model")
    theta: Annotated[float, Field(gt=1)] = Field(10_000.0, description="longest wavelength of the rotation over 2 pi, tokens")


@mixer("retnet")
class RetNet(RecurrentMixer):
    """See the head of this file. Decays and state are of fp32, or fp64 where the streams are."""

    Config = RetNetConfig
    card = Card(
        title="Multi-scale retention (RetNet): linear attention with fixed decays",
        paper="arXiv:2307.08621",
        reference="the parallel form in one matrix",
        kernels=("fla",),
    )
    context_parallel = (ContextParallel.STATE, ContextParallel.HEADS)
    tensor_parallel = {
        "wq": Split.COLUMN,
        "wk": Split.COLUMN,
        "wv": Split.COLUMN,
        "wg": Split.COLUMN,
        "log_decay_H": Split.PER_HEAD,
        "wo": Split.ROW,
    }
    float8 = frozenset({"wq", "wk", "wv", "wg", "wo"})
    config: RetNetConfig

    def __init__(self, config: RetNetConfig, shape: ModelShape, layer: int) -> None:
        """Raises ConfigError where the sizes do not fit."""
        super().__init__(config, shape, layer)
        D, H = shape.d_model, config.n_heads
        self.key_dim, self.value_dim = config.channels(D)
        if self.key_dim % 2:
            raise ConfigError(
                f"{config.kind}: its {self.key_dim} key channels a head turn in pairs; change n_heads or expand_k so that they are even"
            )
        keys, values = H * self.key_dim, H * self.value_dim
        self.wq, self.wk, self.wv, self.wg = (Linear(D, width, bias=False) for width in (keys, keys, values, values))
        self.wo = Linear(values, D, bias=False)

    @staticmethod
    def streams(config: RetNetConfig, shape: ModelShape) -> Mapping[str, Stream]:
        return dict.fromkeys(("q", "k", "v"), Stream(Side.QUERY, config.n_heads))

    @staticmethod
    def cost(config: RetNetConfig, shape: ModelShape, layer: int) -> Cost:
        D, H = shape.d_model, config.n_heads
        K, V = config.channels(D)
        widths = [(D, H * K), (D, H * K), (D, H * V), (D, H * V), (H * V, D)]
        return sum((linear_cost(d_in, d_out) for d_in, d_out in widths), config.recurrence_cost(shape))

    def reset_parameters(self, init: Init) -> None:
        """Linears by the scheme, wo as residual output."""
        for linear in (self.wq, self.wk, self.wv, self.wg):
            init.linear(linear)
        init.residual_output(self.wo, self.layer)

    def why_not_on(self, device_type: str, *, compiled: bool) -> str:
        return why_not(self.config.backend, device_type, compiled=compiled)

    def project(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        """q, k [B, T, H, K], turned; v [B, T, H, V]."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        exponents = torch.linspace(0, 1, self.key_dim // 2, dtype=dtype, device=x_BTD.device)
        angle_BTF = seq.position_BT[..., None].to(dtype) * self.config.theta**-exponents
        cos, sin = angle_BTF.cos()[:, :, None], angle_BTF.sin()[:, :, None]
        q, k = (turn(linear(x_BTD).unflatten(-1, (-1, self.key_dim)), cos, sin, "interleaved") for linear in (self.wq, self.wk))
        return {"q": q, "k": k, "v": self.wv(x_BTD).unflatten(-1, (-1, self.value_dim))}, carry

    def head_params(self, seq: SequenceInfo, carry: Carry) -> tuple[Mapping[str, Tensor], Carry]:
        """log_decay [H], log(1 - 2^(-5-h)) in fp32."""
        h = torch.arange(self.config.n_heads, dtype=torch.float64, device=seq.position_BT.device)
        return {"log_decay_H": torch.log1p(-torch.exp2(-5 - h)).float()}, carry

    @staticmethod
    def mix(
        config: RetNetConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: State | None = None
    ) -> MixResult:
        """y [B, T, H, V]; the state is [B, H, K, V]."""
        q, v = streams["q"], streams["v"]
        y, last = decay_recurrence(
            q * q.shape[-1] ** -0.5,
            streams["k"],
            v,
            head_params["log_decay_H"].expand(v.shape[:3]),
            starts_BT=starts(seq.query),
            state=None if state is None else state["recurrent"],
            chunk_size=config.chunk_size,
            backend=chosen(config.backend, v, ("fla",)),
        )
        return MixResult(y.to(v.dtype), state={"recurrent": last})

    @staticmethod
    def transition(config: RetNetConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> Transition:
        """decay [B, H, 1, 1], state [B, H, K, V]."""
        v = streams["v"]
        return Transition(*decay_transition(streams["k"], v, head_params["log_decay_H"].expand(v.shape[:3]), starts_BT=starts(seq.query)))

    def merge(self, y_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """The norm of each head, the gate, the output projection: [B, T, D]."""
        y = F.rms_norm(y_BTHV, (self.value_dim,), eps=self.config.norm_eps).flatten(2)
        out: Tensor = self.wo(y * F.silu(self.wg(x_BTD)))
        return out

    def initial_state(self, n_rows: int, dtype: torch.dtype, device: torch.device) -> State:
        """Zeros, fp32 [B, H, K, V]."""
        return {"recurrent": torch.zeros(n_rows, self.config.n_heads, self.key_dim, self.value_dim, device=device)}
