"""Isotropic activations: a vector of units keeps its direction, and its length is changed: h phi(|h|) / |h|.

Two kinds. ``isotropic_as_in_the_notes`` is what the research notes had, over all hidden units at once, and it does not work: the length
of many units hardly varies, so with phi = tanh the layer is linear (R^2 0.9998 over 3,072 Gaussian units) and tiny, with
phi = relu it is the identity, and at h = 0 both are NaN. ``isotropic`` mends that: groups of few units, whose length does vary; the root
of their mean square in place of the length, so that phi meets numbers of order 1; a radius below which the output is 0; and no
division by 0. Lengths are computed in fp32 at least.

Shapes: F hidden units, G units a group.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from titanarch.contract.card import Card
from titanarch.contract.channel import Activation, ActivationConfig, activation

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class IsotropicConfig(ActivationConfig):
    """Isotropic in groups of consecutive units."""

    group: Annotated[int, Field(gt=1)] = Field(8, description="units of a group, a divisor of the hidden units of a process; 8 to 32")
    phi: Literal["offset", "tanh"] = Field(
        "offset", description="new size of a group by its root mean square r: max(0, r - offset), or tanh r"
    )
    offset: NonNegative = Field(
        0.25, description="of phi = offset: the size up to which a group is silent; of the order of pre-activations"
    )
    intrinsic: NonNegative = Field(0.0, description="a size that every group has beside its units: r = sqrt(mean square + intrinsic^2)")
    eps: Annotated[float, Field(gt=0)] = Field(1e-12, description="added to the mean square, so that a group of zeros has a direction")


@activation("isotropic")
class Isotropic(Activation):
    """h phi(r) / r over each group, r = sqrt(mean h^2 + intrinsic^2 + eps)."""

    Config = IsotropicConfig
    card = Card("isotropic activation, mended", "research notes; titanarch/models/isotropic.py", "closed form")
    config: IsotropicConfig

    def __init__(self, config: IsotropicConfig) -> None:
        super().__init__(config)
        self.unit_group = config.group

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        groups = x.unflatten(-1, (-1, config.group))
        wide = groups.to(torch.promote_types(x.dtype, torch.float32))
        r = (wide.square().mean(-1, keepdim=True) + (config.intrinsic**2 + config.eps)).sqrt()
        size = (r - config.offset).clamp(min=0) if config.phi == "offset" else torch.tanh(r)
        return (wide * (size / r)).to(x.dtype).flatten(-2)


class IsotropicNotesConfig(ActivationConfig):
    """Isotropic over all units, as the notes had it; broken, see titanarch/models/isotropic.py."""

    phi: Literal["tanh", "relu"] = Field("tanh", description="new length by the old one: tanh, which is all but linear; relu, the identity")


@activation("isotropic_as_in_the_notes")
class IsotropicAsInTheNotes(Activation):
    """h phi(|h|) / |h| over all units; NaN where all are 0."""

    Config = IsotropicNotesConfig
    card = Card("isotropic activation as in the research notes, which does not work", "research notes", "closed form")
    config: IsotropicNotesConfig
    unit_group = None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = wide.square().sum(-1, keepdim=True).sqrt()
        phi = torch.tanh(length) if self.config.phi == "tanh" else torch.relu(length)
        return (wide * (phi / length)).to(x.dtype)
