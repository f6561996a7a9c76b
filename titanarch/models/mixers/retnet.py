"""Multi-scale retention: linear attention whose heads forget at fixed rates (RetNet, arXiv:2307.08621).

S_t = gamma_h S_{t-1} + k_t v_t^T, y_t = S_t^T q_t / sqrt(K), gamma_h = 1 - 2^(-5-h) for head h = 0, 1, ...; queries and keys turn with
the position in their document as in the authors' code: channels 2i and 2i + 1 are a pair, frequencies fall evenly in their logarithm
from 1 to 1 / theta, and lengths do not change (no xPos). The output is W_o (norm of each head(y) * silu(x W_g)), the norm without gain.

Shapes: B rows, T tokens, D model dim, H heads, K key dim, V value dim.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from titanarch.config.errors import ConfigError
from titanarch.contract.card import Card
from titanarch.contract.mixer import MixResult, State, Streams, Transition, mixer
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import Side, Split, Stream
from titanarch.models.mixers.linear_attention import LinearAttention, LinearAttentionConfig, PositiveFloat, decayed_transition, mix_decayed
from titanarch.models.mixers.recurrent import FLA
from titanarch.models.positions.rotary import turn


class RetNetConfig(LinearAttentionConfig):
    """[model.mixers.retnet]; ``n_heads`` comes from [model] unless given here."""

    expand_k: PositiveFloat = Field(1.0, description="width of all keys / d_model")
    expand_v: PositiveFloat = Field(2.0, description="width of all values / d_model")
    theta: Annotated[float, Field(gt=1)] = Field(10_000.0, description="longest wavelength of the rotation over 2 pi, tokens")


@mixer("retnet")
class RetNet(LinearAttention):
    """See the head of this file."""

    Config = RetNetConfig
    card = Card(
        title="Multi-scale retention (RetNet): linear attention with fixed decays",
        paper="arXiv:2307.08621",
        reference="the parallel form in one matrix",
        kernels=FLA,
    )
    tensor_parallel = {**LinearAttention.tensor_parallel, "log_decay_H": Split.PER_HEAD}
    config: RetNetConfig

    def __init__(self, config: RetNetConfig, shape: ModelShape, layer: int) -> None:
        """Raises ConfigError where the sizes do not fit."""
        super().__init__(config, shape, layer)
        if self.key_dim % 2:
            raise ConfigError(
                f"{config.kind}: its {self.key_dim} key channels a head turn in pairs; change n_heads or expand_k so that they are even"
            )

    @staticmethod
    def streams(config: RetNetConfig, shape: ModelShape) -> Mapping[str, Stream]:
        return dict.fromkeys(("q", "k", "v"), Stream(Side.QUERY, config.n_heads))

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
        return mix_decayed(config, streams, _log_decay(streams, head_params), seq, state)

    @staticmethod
    def transition(config: RetNetConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> Transition:
        """decay [B, H, 1, 1], state [B, H, K, V]."""
        return decayed_transition(streams, _log_decay(streams, head_params), seq)

    def merge(self, y_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """The norm of each head, the gate, the output projection: [B, T, D]."""
        return self.gated(y_BTHV, x_BTD)


def _log_decay(streams: Streams, head_params: Mapping[str, Tensor]) -> Tensor:
    """The same at every token, [B, T, H]."""
    return head_params["log_decay_H"].expand(streams["v"].shape[:3])
