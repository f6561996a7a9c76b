"""The plain feed-forward layer (arXiv:1706.03762): down(activation(up(x))).

Shapes: B rows, T tokens, D model dim, F hidden units.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from titanarch.contract.card import Card
from titanarch.contract.channel import ACTIVATIONS, ActivationConfig, channel_mixer
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.split import Split
from titanarch.models.activations import GELUConfig
from titanarch.models.channels.hidden import HiddenChannel, HiddenConfig


class MLPConfig(HiddenConfig):
    """[model.channel] of kind mlp."""

    default_expansion = 4.0
    default_multiple = 1

    activation: Annotated[ActivationConfig, ACTIVATIONS] = Field(GELUConfig(), description="applied to the hidden units")


@channel_mixer("mlp")
class MLP(HiddenChannel):
    """W_down a(W_up x)."""

    Config = MLPConfig
    card = Card("the plain feed-forward layer, with any activation", "arXiv:1706.03762", "transformers GPT2MLP, T5DenseActDense")
    tensor_parallel: ClassVar[Mapping[str, Split]] = {"up": Split.COLUMN("d_ff"), "down": Split.ROW, "activation": Split.REPLICATED}
    float8 = frozenset({"up", "down"})
    second_derivatives = True
    config: MLPConfig

    def __init__(self, config: MLPConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        D, F = shape.d_model, config.hidden_units(shape.d_model)
        self.up = self.projection(D, F)
        self.down = self.projection(F, D)
        self.activation = ACTIVATIONS.of(config.activation)(config.activation)
        self.check_groups(self.activation, F)

    @staticmethod
    def cost(config: MLPConfig, shape: ModelShape) -> Cost:
        D, F = shape.d_model, config.hidden_units(shape.d_model)
        return config.projection_cost(D, F) + config.projection_cost(F, D)

    def reset_parameters(self, init: Init) -> None:
        """up as a linear of the scheme, down as a residual output; other linear layers than dense ones their own."""
        self.up.reset(init)
        self.down.reset(init, residual_of=self.layer)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        out: Tensor = self.down(self.drop(self.activation(self.up(x_BTD)), seq))
        return out
