"""A feed-forward layer whose hidden units are squared: down(max(up(x), 0)^2), as in arXiv:2109.08668.

Shapes: B rows, T tokens, D model dim, F hidden units.
"""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from titanarch.contract.channel import ChannelConfig, ChannelMixer, channel_mixer
from titanarch.contract.cost import Cost, linear_cost
from titanarch.contract.init import Init
from titanarch.contract.layers import Linear
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.split import Split


class SquaredReluConfig(ChannelConfig):
    """[model.channel] of kind squared_relu."""

    d_ff: Annotated[int, Field(gt=0)] = Field(1024, description="hidden units")


@channel_mixer("squared_relu")
class SquaredRelu(ChannelMixer):
    """W_down max(W_up x, 0)^2. Tensor parallelism divides the hidden units."""

    Config = SquaredReluConfig
    tensor_parallel = {"up": Split.COLUMN("d_ff"), "down": Split.ROW}
    float8 = frozenset({"up", "down"})

    def __init__(self, config: SquaredReluConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        self.config = config
        self.layer = layer
        self.up = Linear(shape.d_model, config.d_ff, bias=False)
        self.down = Linear(config.d_ff, shape.d_model, bias=False)

    @staticmethod
    def cost(config: SquaredReluConfig, shape: ModelShape) -> Cost:
        return linear_cost(shape.d_model, config.d_ff) + linear_cost(config.d_ff, shape.d_model)

    def reset_parameters(self, init: Init) -> None:
        """up as a linear of the scheme, down as a residual output."""
        init.linear(self.up)
        init.residual_output(self.down, self.layer)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        hidden_BTF = F.relu(self.up(x_BTD)).square()
        out: Tensor = self.down(hidden_BTF)
        return out
