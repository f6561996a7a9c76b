"""A moving average: every head averages the values of its document so far, the latest weighing most.

y_t = a y_{t-1} + (1 - a) v_t with a learned decay 0 < a < 1 a head, and y = 0 before a document. All tokens at once, in log2(T)
rounds that each double how far back a token has seen (Hillis and Steele, 1986).

Shapes: B rows, T tokens, D model dim, H heads, V channels a head.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from titanarch.config.errors import ConfigError
from titanarch.contract.cost import Cost, linear_cost
from titanarch.contract.init import Init
from titanarch.contract.layers import HeadParams, Linear
from titanarch.contract.mixer import MixerConfig, MixResult, RecurrentMixer, State, Streams, Transition, mixer
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import ContextParallel, Side, Split, Stream


class MovingAverageConfig(MixerConfig):
    """[model.mixers.moving_average]; ``n_heads`` comes from [model] unless given here."""

    n_heads: Annotated[int, Field(gt=0)] = Field(description="heads, each with a decay of its own")


@mixer("moving_average")
class MovingAverage(RecurrentMixer):
    """W_o (sigmoid(x W_g) * y) with y the average of v = x W_v."""

    Config = MovingAverageConfig
    context_parallel = (ContextParallel.STATE, ContextParallel.HEADS)
    tensor_parallel = {
        "wv": Split.COLUMN,
        "wg": Split.COLUMN,
        "wo": Split.ROW,
        "head": Split.REPLICATED,
        "decay_H": Split.PER_HEAD,
    }
    float8 = frozenset({"wv", "wg", "wo"})
    fp32 = frozenset({"head"})

    def __init__(self, config: MovingAverageConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        D, H = shape.d_model, config.n_heads
        if D % H:
            raise ConfigError(f"moving_average: d_model ({D}) is not a multiple of n_heads ({H}); change one of them")
        self.wv, self.wg, self.wo = (Linear(D, D, bias=False) for _ in range(3))
        self.head = HeadParams({"decay_H": (H,)})

    @staticmethod
    def streams(config: MovingAverageConfig, shape: ModelShape) -> Mapping[str, Stream]:
        return {"v": Stream(Side.QUERY, config.n_heads)}

    @staticmethod
    def cost(config: MovingAverageConfig, shape: ModelShape, layer: int) -> Cost:
        D, H = shape.d_model, config.n_heads
        linears = linear_cost(D, D) + linear_cost(D, D) + linear_cost(D, D)
        return linears + Cost(parameters=H, state_bytes=4 * D)

    def reset_parameters(self, init: Init) -> None:
        """wv and wg as linears of the scheme, wo as residual output; decays sigmoid(0 .. 5), that is means over 2 to 150 tokens."""
        init.linear(self.wv)
        init.linear(self.wg)
        init.residual_output(self.wo, self.layer)
        init.fill(self.head, "decay_H", lambda shape, _: torch.linspace(0.0, 5.0, *shape))

    def project(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        """v [B, T, H, V] of the local heads."""
        head_dim = self.wv.in_features // self.config.n_heads
        return {"v": self.wv(x_BTD).unflatten(-1, (-1, head_dim))}, carry

    @staticmethod
    def mix(
        config: MovingAverageConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: State | None = None
    ) -> MixResult:
        """The averages [B, T, H, V]; the last one is the state."""
        y_BTHV, kept_BTH1 = averages(streams["v"], head_params["decay_H"], seq.query)
        if state is not None:
            y_BTHV = y_BTHV + kept_BTH1 * state["recurrent"][:, None]
        return MixResult(y_BTHV.to(streams["v"].dtype), state={"recurrent": y_BTHV[:, -1]})

    @staticmethod
    def transition(config: MovingAverageConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> Transition:
        """decay [B, H, 1], state [B, H, V]."""
        y_BTHV, kept_BTH1 = averages(streams["v"], head_params["decay_H"], seq.query)
        return Transition(kept_BTH1[:, -1], y_BTHV[:, -1])

    def merge(self, y_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """Gate, then the output projection: [B, T, D]."""
        return self.wo(y_BTHV.flatten(2) * torch.sigmoid(self.wg(x_BTD)))

    def initial_state(self, n_rows: int, dtype: torch.dtype, device: torch.device) -> State:
        """Zeros, fp32 [B, H, V]."""
        H = self.config.n_heads
        return {"recurrent": torch.zeros(n_rows, H, self.wv.in_features // H, device=device)}


def averages(v_BTHV: Tensor, decay_H: Tensor, here: SequenceInfo) -> tuple[Tensor, Tensor]:
    """y as if nothing came before the tokens here, [B, T, H, V], and how much of what came before each still has, [B, T, H, 1].

    Both in the dtype of the decays. A document's first token has nothing of what came before.
    """
    a_H1 = torch.sigmoid(decay_H)[:, None]
    y = (1 - a_H1) * v_BTHV.to(a_H1.dtype)
    kept = a_H1.expand(*y.shape[:3], 1).masked_fill((here.position_BT == 0)[:, :, None, None], 0)
    n, before = 1, (0, 0, 0, 0)
    while n < y.shape[1]:
        y = y + kept * F.pad(y[:, :-n], (*before, n, 0))
        kept = kept * F.pad(kept[:, :-n], (*before, n, 0), value=1.0)
        n *= 2
    return y, kept
