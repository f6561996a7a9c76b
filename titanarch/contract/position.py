"""Position schemes, by three hooks: embed, rotate, table.

A scheme depends on the position inside a document or on a distance, never on where a tensor lies, so that each works
with any attention, packing and context parallelism. Shapes: B rows, T tokens, D model dim, H heads, K head dim.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from titanarch.config.registry import ComponentConfig, Registry
from titanarch.contract.card import Card
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry


class AbsolutePositionConfig(ComponentConfig):
    """The table of one absolute position scheme, [model.position.absolute]."""


class AbsolutePosition(nn.Module, ABC):
    """Changes the token embeddings by their positions."""

    Config: ClassVar[type[AbsolutePositionConfig]]
    card: ClassVar[Card | None] = None

    @abstractmethod
    def __init__(self, config: Any, shape: ModelShape) -> None:
        super().__init__()

    @staticmethod
    @abstractmethod
    def cost(config: Any, shape: ModelShape) -> Cost:
        """Parameters; the sum costs nothing that is counted."""

    @abstractmethod
    def reset_parameters(self, init: Init) -> None:
        """Fill every parameter through ``init``."""

    def max_length(self) -> int | None:
        """Positions it has, or None where any position has an embedding."""
        return None

    @abstractmethod
    def forward(self, x_BTD: Tensor, position_BT: Tensor) -> Tensor:
        """The embed hook: token embeddings [B, T, D] and their positions, to [B, T, D]."""


class RelativePositionConfig(ComponentConfig):
    """The table of one relative position scheme, [model.position.relative]."""


class RelativePosition(nn.Module, ABC):
    """Rotates queries and keys, or biases logits by distance; each attention layer has one of its own.

    Bias networks and tables are fp32 modules: an attention layer declares them so.
    """

    Config: ClassVar[type[RelativePositionConfig]]
    card: ClassVar[Card | None] = None
    has_table: ClassVar[bool] = False
    """Whether ``table`` gives a bias."""
    learned_table: ClassVar[bool] = False
    """Whether the table has parameters, so that its gradient is wanted."""
    rotates: ClassVar[bool] = False
    """Whether ``rotate`` changes queries and keys."""

    @abstractmethod
    def __init__(self, config: Any, shape: ModelShape, layer: int, n_heads: int, head_dim: int) -> None:
        super().__init__()

    @staticmethod
    @abstractmethod
    def cost(config: Any, shape: ModelShape, layer: int, n_heads: int, head_dim: int) -> Cost:
        """Parameters and forward FLOPs a token."""

    @abstractmethod
    def reset_parameters(self, init: Init) -> None:
        """Fill every parameter through ``init``."""

    def rotate(self, q_BTHK: Tensor, k_BTGK: Tensor, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys turned by their positions; before any exchange between processes."""
        return q_BTHK, k_BTGK

    def forward(self, n_distances: int, bidirectional: bool, carry: Carry) -> tuple[Tensor, Carry]:
        """The table hook: fp32 bias added to the logits of all heads.

        [H, n_distances] for distances query - key = 0, 1, ...; if ``bidirectional``
        [H, 2 n_distances - 1] for -(n_distances - 1) and up. The carry serves tables shared between layers.
        """
        raise NotImplementedError(f"{type(self).__qualname__} has no table")


ABSOLUTE_POSITIONS: Registry[AbsolutePosition] = Registry("absolute position")
absolute_position = ABSOLUTE_POSITIONS.register
RELATIVE_POSITIONS: Registry[RelativePosition] = Registry("relative position")
relative_position = RELATIVE_POSITIONS.register
