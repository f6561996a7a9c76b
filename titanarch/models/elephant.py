"""Elephant activation (arXiv:2509.19159): 1 / (1 + |x / a|^delta), a plateau of width 2 a with steep sides, flat elsewhere.

Computed as sigmoid(-delta ln |x / a|) in fp32 at least, with |x / a| no less than 1e-6: the power itself overflows in half precision, and
its gradient is then NaN. For x ~ N(0, 1), a = 2 and delta = 8 it is nearly constant (mean 0.94), so a should be of the order of the
pre-activations, and the mean may be subtracted.
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from titanarch.contract.card import Card
from titanarch.contract.channel import Activation, ActivationConfig, activation

LEAST = 1e-6
N_POINTS, REACH = 4001, 8.0
"""Of the midpoint rule over the normal density: points, and standard deviations on each side."""


class ElephantConfig(ActivationConfig):
    """A plateau around 0."""

    a: Annotated[float, Field(gt=0)] = Field(2.0, description="where it is one half, in units of the pre-activation")
    delta: Annotated[float, Field(gt=1)] = Field(8.0, description="steepness of the sides: the slope at a is delta / (4 a)")
    subtract_mean_at: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="subtract its mean over normal pre-activations of this standard deviation, a constant; unset: nothing is subtracted",
    )


@activation("elephant")
class Elephant(Activation):
    """1 / (1 + |x / a|^delta), less a constant where wanted."""

    Config = ElephantConfig
    card = Card("elephant activation", "arXiv:2509.19159", "closed form")
    config: ElephantConfig

    def __init__(self, config: ElephantConfig) -> None:
        super().__init__(config)
        at = config.subtract_mean_at
        self.subtracted = 0.0 if at is None else normal_mean(config.a / at, config.delta)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = torch.sigmoid(-self.config.delta * (wide / self.config.a).abs().clamp(min=LEAST).log())
        return (y - self.subtracted).to(x.dtype)


def normal_mean(a: float, delta: float) -> float:
    """The mean of 1 / (1 + |x / a|^delta) for x ~ N(0, 1), by the midpoint rule."""
    width = 2 * REACH / N_POINTS
    points = ((i + 0.5) * width - REACH for i in range(N_POINTS))
    return sum(width * math.exp(-x * x / 2) / math.sqrt(2 * math.pi) / (1 + abs(x / a) ** delta) for x in points)
