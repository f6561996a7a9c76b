"""No channel mixer: a block of sequence mixing alone."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from titanarch.contract.card import Card
from titanarch.contract.channel import ChannelConfig, ChannelMixer, channel_mixer
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.split import Split


class NoChannelConfig(ChannelConfig):
    """No keys."""


@channel_mixer("none")
class NoChannel(ChannelMixer):
    """Adds nothing. A block leaves it out together with its norm."""

    Config = NoChannelConfig
    card = Card("no channel mixer", "-", "closed form")
    tensor_parallel: ClassVar[Mapping[str, Split]] = {}
    second_derivatives = True

    def __init__(self, config: NoChannelConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)

    @staticmethod
    def cost(config: NoChannelConfig, shape: ModelShape) -> Cost:
        return Cost()

    def reset_parameters(self, init: Init) -> None:
        """No parameters."""

    def forward(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        return torch.zeros_like(x_BTD)
