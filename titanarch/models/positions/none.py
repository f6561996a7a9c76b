"""No position scheme (NoPE): causal masking alone tells the order of tokens (arXiv:2305.19466)."""

from torch import Tensor

from titanarch.contract.card import Card
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.position import (
    AbsolutePosition,
    AbsolutePositionConfig,
    RelativePosition,
    RelativePositionConfig,
    absolute_position,
    relative_position,
)
from titanarch.contract.shape import ModelShape


class NoAbsolutePositionConfig(AbsolutePositionConfig):
    """No keys."""


@absolute_position("none")
class NoAbsolutePosition(AbsolutePosition):
    """Leaves the embeddings as they are."""

    Config = NoAbsolutePositionConfig
    card = Card("no positions in the embeddings (NoPE)", "arXiv:2305.19466", "closed form")

    def __init__(self, config: NoAbsolutePositionConfig, shape: ModelShape) -> None:
        super().__init__(config, shape)

    @staticmethod
    def cost(config: NoAbsolutePositionConfig, shape: ModelShape) -> Cost:
        return Cost()

    def reset_parameters(self, init: Init) -> None:
        """No parameters."""

    def forward(self, x_BTD: Tensor, position_BT: Tensor) -> Tensor:
        return x_BTD


class NoRelativePositionConfig(RelativePositionConfig):
    """No keys."""


@relative_position("none")
class NoRelativePosition(RelativePosition):
    """Neither rotates nor biases."""

    Config = NoRelativePositionConfig
    card = Card("neither rotation nor bias (NoPE)", "arXiv:2305.19466", "closed form")

    def __init__(self, config: NoRelativePositionConfig, shape: ModelShape, layer: int, n_heads: int, head_dim: int) -> None:
        super().__init__(config, shape, layer, n_heads, head_dim)

    @staticmethod
    def cost(config: NoRelativePositionConfig, shape: ModelShape, layer: int, n_heads: int, head_dim: int) -> Cost:
        return Cost()

    def reset_parameters(self, init: Init) -> None:
        """No parameters."""
