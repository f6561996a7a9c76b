"""Norms over the model dimension."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from titanarch.config.registry import ComponentConfig, Registry
from titanarch.contract.card import Card
from titanarch.contract.init import Init


class NormConfig(ComponentConfig):
    """The table of one norm."""


class Norm(nn.Module, ABC):
    """Normalizes the last dimension, statistics in fp32."""

    Config: ClassVar[type[NormConfig]]
    card: ClassVar[Card | None] = None

    @abstractmethod
    def __init__(self, config: Any, dim: int) -> None:
        """``dim``: size of the dimension normalized, channels."""
        super().__init__()

    @staticmethod
    @abstractmethod
    def n_parameters(config: Any, dim: int) -> int:
        """How many parameters it has."""

    @abstractmethod
    def reset_parameters(self, init: Init) -> None:
        """Fill every parameter through ``init``."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., dim], in x's dtype."""


NORMS: Registry[Norm] = Registry("norm")
norm = NORMS.register
