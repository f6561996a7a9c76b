"""Linear layers: dense or structured maps from the last dimension to another size, as the projections of a component.

Shapes: [..., d_in] to [..., d_out].
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from titanarch.config.registry import ComponentConfig, Registry
from titanarch.contract.card import Card
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init


class LinearConfig(ComponentConfig):
    """The table of one linear layer, such as [model.channel.linear]."""


class LinearLayer(nn.Module, ABC):
    """Built with ``(config, d_in, d_out, bias=...)``; ``cost`` takes the same."""

    Config: ClassVar[type[LinearConfig]]
    card: ClassVar[Card | None] = None
    takes_float8: ClassVar[bool] = False
    """Whether it is one product of a dense matrix, which float8 can replace."""
    why_not_divided: ClassVar[str] = ""
    """Why tensor parallelism cannot divide it; empty where it can, as a contract.layers.Linear."""

    @staticmethod
    @abstractmethod
    def cost(config: Any, d_in: int, d_out: int, *, bias: bool) -> Cost:
        """Parameters and forward FLOPs a token."""

    @abstractmethod
    def reset(self, init: Init, *, residual_of: int | None = None) -> None:
        """Fill every parameter through ``init``. ``residual_of``: it writes to the residual stream in that block."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out]."""


LINEARS: Registry[LinearLayer] = Registry("linear layer")
linear_layer = LINEARS.register
