"""Channel mixers: what transforms each token by itself; and the parts they are made of: activations."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from titanarch.config.registry import ComponentConfig, Registry
from titanarch.contract.card import Card
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import Split


class ChannelConfig(ComponentConfig):
    """The table of one channel mixer, [model.channel]."""


class ChannelMixer(nn.Module, ABC):
    """What a block applies to every token. ``seq`` serves those that look at the token before (RWKV)."""

    Config: ClassVar[type[ChannelConfig]]
    card: ClassVar[Card | None] = None
    config: Any
    """Its table, with the sizes filled in that ``tensor_parallel`` names."""
    tensor_parallel: ClassVar[Mapping[str, Split]]
    """Every direct child and parameter."""
    float8: ClassVar[frozenset[str]] = frozenset()
    """The Linears that may go to float8."""
    fp32: ClassVar[frozenset[str]] = frozenset()
    """Children that stay fp32 in compute."""
    second_derivatives: ClassVar[bool] = False
    """Whether it looks at each token alone and can be differentiated twice, as energy-based models do."""
    first_unit: int = 0
    """Number of the first hidden unit on this process among all of them; parallel/ sets it where it divides them."""
    share: float = 1.0
    """What an auxiliary loss counts in the gradient here; parallel/ sets it where several processes compute it alike."""

    @abstractmethod
    def __init__(self, config: Any, shape: ModelShape, layer: int) -> None:
        """Allocate parameters; ``layer`` counts blocks from 0."""
        super().__init__()

    @staticmethod
    @abstractmethod
    def cost(config: Any, shape: ModelShape) -> Cost:
        """Parameters and forward FLOPs a token."""

    @abstractmethod
    def reset_parameters(self, init: Init) -> None:
        """Fill every parameter through ``init``; the docstring lists each initializer."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        """What is added to the residual stream, [B, T, D]."""

    def run(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Tensor, Carry]:
        """``forward``; those with auxiliary losses override it and add them to the carry."""
        out: Tensor = self(x_BTD, seq)
        return out, carry

    def after_update(self) -> None:
        """Called after every update of the parameters, on all processes."""

    def after_skip(self) -> None:
        """Called in place of ``after_update`` where an update is not made: what the forwards counted for it is to be forgotten."""


class ActivationConfig(ComponentConfig):
    """The table of one activation."""


class Activation(nn.Module, ABC):
    """Applied to [..., F] hidden units; the same shape comes back."""

    Config: ClassVar[type[ActivationConfig]]
    card: ClassVar[Card | None] = None
    unit_group: int | None = 1
    """How many consecutive units it reads together, so that only whole groups can be divided; None: all units."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[..., F] to [..., F]."""


CHANNELS: Registry[ChannelMixer] = Registry("channel mixer")
channel_mixer = CHANNELS.register
ACTIVATIONS: Registry[Activation] = Registry("activation")
activation = ACTIVATIONS.register
