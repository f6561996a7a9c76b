"""The channel mix of RWKV (arXiv:2503.14456; BlinkDL/RWKV-LM, RWKV-v7): down(relu(up(x_t + (x_{t-1} - x_t) mu))^2).

Shapes: B rows, T tokens, D model dim, F hidden units.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanarch.contract.card import Card
from titanarch.contract.channel import channel_mixer
from titanarch.contract.cost import Cost, linear_cost
from titanarch.contract.init import Draw, Init
from titanarch.contract.layers import Linear, local
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.split import Split
from titanarch.models.channels.hidden import HiddenChannel, HiddenConfig


class RWKVConfig(HiddenConfig):
    """[model.channel] of kind rwkv."""

    default_expansion = 4.0
    default_multiple = 1


@channel_mixer("rwkv")
class RWKVChannel(HiddenChannel):
    """Two projections with a squared ReLU between them; the first reads a mixture of each token and the one before."""

    Config = RWKVConfig
    card = Card("RWKV channel mix: a squared-ReLU MLP of a token and the one before", "arXiv:2503.14456", "closed form")
    tensor_parallel = {"up": Split.COLUMN("d_ff"), "down": Split.ROW, "shift_D": Split.SHARED}
    float8 = frozenset({"up", "down"})
    config: RWKVConfig

    def __init__(self, config: RWKVConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        D, n_units = shape.d_model, config.hidden_units(shape.d_model)
        self.up, self.down = Linear(D, n_units, bias=config.bias), Linear(n_units, D, bias=config.bias)
        self.shift_D = nn.Parameter(torch.empty(D))

    @staticmethod
    def cost(config: RWKVConfig, shape: ModelShape) -> Cost:
        """``state_bytes``: the token before, in 2 bytes a channel."""
        D, n_units = shape.d_model, config.hidden_units(shape.d_model)
        return linear_cost(D, n_units, bias=config.bias) + linear_cost(n_units, D, bias=config.bias) + Cost(D, state_bytes=2 * D)

    def reset_parameters(self, init: Init) -> None:
        """As published, with l the block of L: up orthogonal; down 0; biases 0; shift 1 - (i/D)^((1 - l/L)^4)."""
        init.fill(self.up, "weight", lambda shape, g: nn.init.orthogonal_(torch.empty(shape), generator=g))
        init.constant(self.down, "weight", 0.0)
        for linear in (self.up, self.down):
            if linear.bias is not None:
                init.constant(linear, "bias", 0.0)
        init.fill(self, "shift_D", _shift(self.layer, init.n_layers))

    def forward(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        mixed = x_BTD + (seq.previous(x_BTD, 1) - x_BTD) * local(self.shift_D)
        out: Tensor = self.down(self.drop(F.relu(self.up(mixed)).square(), seq))
        return out


def _shift(layer: int, n_layers: int) -> Draw:
    return lambda shape, _: 1 - (torch.arange(shape[0]) / shape[0]) ** ((1 - layer / n_layers) ** 4)
