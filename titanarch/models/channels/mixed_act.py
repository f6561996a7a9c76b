"""The mixed activation of the march experiments: every hidden unit is a slow and a fast one together.

The notes keep the name alone ("slightly worse, more varied"); march's published history defines it as
down((sigmoid(slow(x)) + relu(fast(x))) / 2), and a variant with the sum in place of the mean. Activations that differ
from unit to unit are another thing: ``kind = "mlp"`` with ``activation = {kind = "mixed", ...}``.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from titanarch.contract.card import Card
from titanarch.contract.channel import channel_mixer
from titanarch.models.channels.glu import GLU, GLUConfig


class MixedActConfig(GLUConfig):
    """[model.channel] of kind mixed_act."""

    combine: Literal["mean", "sum"] = Field("mean", description="how the sigmoid and the ReLU of a unit are put together")


@channel_mixer("mixed_act")
class MixedAct(GLU):
    """sigmoid(gate) and relu(up), their mean or sum; ``gate`` is the slow projection, ``up`` the fast one."""

    Config = MixedActConfig
    card = Card("a sigmoid and a ReLU together in every unit", "march (research notes)", "closed form")
    config: MixedActConfig

    def hidden(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        total = torch.sigmoid(gate_BTF) + F.relu(up_BTF)
        return total / 2 if self.config.combine == "mean" else total
