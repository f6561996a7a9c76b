"""Mamba-2: a selective state-space model with one decay a head (arXiv:2405.21060).

With dt = softplus(u W_dt + dt_bias), a = -exp(A_log) and x, B, C = silu(causal convolution of projections of u), a head keeps
S_t = exp(dt_t a) S_{t-1} + dt_t B_t x_t^T and gives y_t = S_t^T C_t + D x_t. The output is W_o RMSNorm(y * silu(u W_z)).

Shapes: B rows, T tokens, D model dim, H heads, P channels a head, G groups of heads that share B and C, N state channels, C = H P.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from titanarch.config.errors import ConfigError
from titanarch.contract.card import Card
from titanarch.contract.cost import Cost, linear_cost, mean_visible_keys
from titanarch.contract.init import Init
from titanarch.contract.layers import HeadNorm, HeadParams, Linear, local
from titanarch.contract.mixer import MixerConfig, MixResult, State, Streams, Transition, mixer
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import ContextParallel, Side, Split, Stream
from titanarch.models.mixers.recurrent import BACKEND, KernelMixer, incoming, log_uniform, step_biases
from titanarch.models.short_conv import ShortConv
from titanarch.ops._decay_kernels import mamba_ssm_recurrence
from titanarch.ops.decay_recurrence import decay_recurrence, decay_transition
from titanarch.ops.recurrence_backend import chosen

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
DEFAULT_HEAD_DIM, FEWEST_HEADS = 64, 4
KERNELS = ("mamba_ssm", "fla")


class Mamba2Config(MixerConfig):
    """[model.mixers.mamba2]; it does not take ``n_heads`` of [model], as its width has heads of its own."""

    expand: PositiveFloat = Field(2.0, description="inner width / d_model")
    head_dim: Positive | None = Field(None, description="channels a head; unset: inner width / n_heads, or 64 where that leaves 4 heads")
    n_heads: Positive | None = Field(None, description="heads; unset: inner width / head_dim")
    state_dim: Positive = Field(128, description="state channels of each of a head's channels")
    n_groups: Positive = Field(1, description="groups of heads that share B and C, a divisor of the heads; the norm is of each group")
    conv_size: Positive = Field(4, description="taps of the causal convolutions, tokens")
    conv_bias: bool = Field(True, description="biases of the convolutions")
    dt_min: PositiveFloat = Field(0.001, description="shortest initial time step")
    dt_max: PositiveFloat = Field(0.1, description="longest initial time step; they are drawn evenly in their logarithm")
    dt_floor: PositiveFloat = Field(1e-4, description="initial time steps are raised to this")
    a_min: PositiveFloat = Field(1.0, description="slowest initial decay rate, per unit of time")
    a_max: PositiveFloat = Field(16.0, description="fastest initial decay rate; they are drawn evenly")
    norm_eps: PositiveFloat = Field(1e-5, description="added to the mean square in the norm")
    chunk_size: Positive = Field(256, description="tokens computed at once, which no result depends on; on a CPU 64 is faster")
    backend: Literal["auto", "reference", "mamba_ssm", "fla"] = Field("auto", description=BACKEND)

    def sized(self, d_model: int) -> "Mamba2Config":
        """With ``n_heads`` and ``head_dim`` filled in; a ConfigError where the sizes do not fit."""
        exact = self.expand * d_model
        inner = round(exact)
        if abs(exact - inner) > 1e-6:
            raise ConfigError(f"{self.kind}: expand ({self.expand}) of d_model ({d_model}) is {exact:g} channels; choose one that is whole")
        if self.head_dim is None and self.n_heads is None:
            head_dim = min(DEFAULT_HEAD_DIM, max(inner // FEWEST_HEADS, 1))
        else:
            head_dim = self.head_dim or max(inner // (self.n_heads or 1), 1)
        n_heads = self.n_heads or max(inner // head_dim, 1)
        if n_heads * head_dim != inner:
            raise ConfigError(
                f"{self.kind}: n_heads ({n_heads}) of head_dim ({head_dim}) do not make the inner width {inner} = expand ({self.expand}) x "
                f"d_model ({d_model}); remove n_heads and give a divisor of {inner} as head_dim"
            )
        if n_heads % self.n_groups:
            raise ConfigError(f"{self.kind}: n_groups ({self.n_groups}) does not divide its {n_heads} heads; use a divisor of them")
        if self.dt_min > self.dt_max or self.a_min > self.a_max:
            raise ConfigError(f"{self.kind}: dt_min and a_min must not be above dt_max and a_max")
        return self.model_copy(update={"n_heads": n_heads, "head_dim": head_dim})


class ChannelGain(nn.Module):
    """A factor for each channel of all heads, divided with them."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.gain_C = nn.Parameter(torch.empty(n_channels))

    def forward(self, head_dim: int) -> Tensor:
        """[H, V] of the local heads."""
        return local(self.gain_C).unflatten(0, (-1, head_dim))


@mixer("mamba2")
class Mamba2(KernelMixer):
    """State space duality: see the head of this file. State and decays are of fp32, or fp64 where the streams are."""

    Config = Mamba2Config
    card = Card(
        title="Mamba-2: selective state space with one decay a head",
        paper="arXiv:2405.21060",
        reference="transformers Mamba2Mixer",
        kernels=(*KERNELS, "causal_conv1d"),
    )
    context_parallel = (ContextParallel.STATE, ContextParallel.HEADS)
    tensor_parallel = {
        "wz": Split.COLUMN,
        "wx": Split.COLUMN,
        "wb": Split.COLUMN("n_groups"),
        "wc": Split.COLUMN("n_groups"),
        "wdt": Split.COLUMN,
        "conv_x": Split.COLUMN,
        "conv_b": Split.COLUMN("n_groups"),
        "conv_c": Split.COLUMN("n_groups"),
        "head": Split.REPLICATED,
        "a_log_H": Split.PER_HEAD,
        "dt_bias_H": Split.PER_HEAD,
        "d_H": Split.PER_HEAD,
        "norm": Split.REPLICATED,
        "gain": Split.COLUMN,
        "wo": Split.ROW,
    }
    float8 = frozenset({"wz", "wx", "wb", "wc", "wo"})  # wdt has a channel a head alone, and what it gives is exponentiated
    fp32 = frozenset({"head"})
    kernels = KERNELS
    config: Mamba2Config

    def __init__(self, config: Mamba2Config, shape: ModelShape, layer: int) -> None:
        """Raises ConfigError where the sizes do not fit."""
        super().__init__(config, shape, layer)
        self.config = config.sized(shape.d_model)
        H, P, G, N, D = *_heads(self.config), config.n_groups, config.state_dim, shape.d_model
        self.state_shape = (H, N, P)
        self.wz, self.wx, self.wdt = (Linear(D, width, bias=False) for width in (H * P, H * P, H))
        self.wb, self.wc = (Linear(D, G * N, bias=False) for _ in range(2))
        self.conv_x = ShortConv(H * P, config.conv_size, bias=config.conv_bias, backend=config.backend)
        self.conv_b, self.conv_c = (ShortConv(G * N, config.conv_size, bias=config.conv_bias, backend=config.backend) for _ in range(2))
        self.head = HeadParams({"a_log_H": (H,), "dt_bias_H": (H,), "d_H": (H,)})
        self.norm = HeadNorm(G, eps=config.norm_eps)
        self.gain = ChannelGain(H * P)
        self.wo = Linear(H * P, D, bias=False)

    @staticmethod
    def streams(config: Mamba2Config, shape: ModelShape) -> Mapping[str, Stream]:
        H, _ = _heads(config.sized(shape.d_model))
        heads, groups = Stream(Side.QUERY, H), Stream(Side.QUERY, config.n_groups)
        return {"x": heads, "dt": heads, "b": groups, "c": groups}

    @staticmethod
    def cost(config: Mamba2Config, shape: ModelShape, layer: int) -> Cost:
        """The products of a chunk count the tokens that each sees in it; the state is of fp32."""
        H, P, G, N, D = *_heads(config.sized(shape.d_model)), config.n_groups, config.state_dim, shape.d_model
        linears = [(D, H * P), (D, H * P), (D, G * N), (D, G * N), (D, H), (H * P, D)]
        cost = sum((linear_cost(d_in, d_out) for d_in, d_out in linears), Cost())
        for width in (H * P, G * N, G * N):
            cost += ShortConv.cost(width, config.conv_size, bias=config.conv_bias)
        visible = mean_visible_keys(min(config.chunk_size, shape.seq_len))
        return cost + Cost(3 * H + H * P, 2 * visible * (G * N + H * P) + 4 * H * P * N, 4 * H * P * N)

    def reset_parameters(self, init: Init) -> None:
        """Linears by the scheme, wo as residual output; convolutions their own; a_log log U(a_min, a_max); dt_bias the inverse softplus
        of exp U(log dt_min, log dt_max), at least dt_floor; d 1; gain 1."""
        for linear in (self.wz, self.wx, self.wb, self.wc, self.wdt):
            init.linear(linear)
        init.residual_output(self.wo, self.layer)
        for conv in (self.conv_x, self.conv_b, self.conv_c):
            conv.reset_parameters(init)
        c = self.config
        init.fill(self.head, "a_log_H", partial(log_uniform, c.a_min, c.a_max))
        init.fill(self.head, "dt_bias_H", partial(step_biases, low=c.dt_min, high=c.dt_max, floor=c.dt_floor))
        init.constant(self.head, "d_H", 1.0)
        init.constant(self.gain, "gain_C", 1.0)

    def project(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        """x [B, T, H, P]; b, c [B, T, G, N]; dt [B, T, H], before its bias and softplus."""
        _, P = _heads(self.config)
        x = F.silu(self.conv_x(self.wx(x_BTD), seq)).unflatten(-1, (-1, P))
        b, c = (
            F.silu(conv(linear(x_BTD), seq)).unflatten(-1, (-1, self.config.state_dim))
            for linear, conv in ((self.wb, self.conv_b), (self.wc, self.conv_c))
        )
        return {"x": x, "dt": self.wdt(x_BTD), "b": b, "c": c}, carry

    @staticmethod
    def mix(
        config: Mamba2Config, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: State | None = None
    ) -> MixResult:
        """y [B, T, H, P]; the state is [B, H, N, P]."""
        x, b, c = streams["x"], streams["b"], streams["c"]
        dt_BTH, a_H = _time_steps(streams, head_params)
        starts_BT, before = seq.query.starts_BT, incoming(state)
        backend = chosen(config.backend, x, KERNELS)
        if backend == "mamba_ssm":
            if before is None:
                before = x.new_zeros(x.shape[0], x.shape[2], b.shape[3], x.shape[3], dtype=torch.float32)
            y, last = mamba_ssm_recurrence(
                x, dt_BTH, a_H, b, c, starts_BT=starts_BT, state_BHKV=before, chunk_size=config.chunk_size
            )  # fmt: skip
        else:
            entering = x * dt_BTH[..., None]
            entering = entering.to(x.dtype) if backend == "fla" else entering
            y, last = decay_recurrence(
                c, b, entering, dt_BTH * a_H, starts_BT=starts_BT, state=before, chunk_size=config.chunk_size, backend=backend
            )  # fmt: skip
        y = y + head_params["d_H"][:, None] * x
        return MixResult(y.to(x.dtype), state={"recurrent": last})

    @staticmethod
    def transition(config: Mamba2Config, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> Transition:
        """decay [B, H, 1, 1], state [B, H, N, P]."""
        dt_BTH, a_H = _time_steps(streams, head_params)
        entering = streams["x"] * dt_BTH[..., None]
        return Transition(*decay_transition(streams["b"], entering, dt_BTH * a_H, starts_BT=seq.query.starts_BT))

    def merge(self, y_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """Gate, the norm of each group, then the output projection: [B, T, D]."""
        z = self.wz(x_BTD).unflatten(-1, (-1, y_BTHV.shape[3]))
        dtype = torch.promote_types(z.dtype, torch.float32)
        gated = y_BTHV.to(dtype) * F.silu(z.to(dtype))
        out: Tensor = self.wo(self.norm(gated, self.gain(y_BTHV.shape[3])).to(y_BTHV.dtype).flatten(2))
        return out


def _heads(sized: Mamba2Config) -> tuple[int, int]:
    """Heads and their channels."""
    assert sized.n_heads is not None, "the table was completed by sized()"
    assert sized.head_dim is not None, "the table was completed by sized()"
    return sized.n_heads, sized.head_dim


def _time_steps(streams: Streams, head_params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """dt [B, T, H] and a [H], at least fp32."""
    return F.softplus(streams["dt"] + head_params["dt_bias_H"]), -torch.exp(head_params["a_log_H"])
