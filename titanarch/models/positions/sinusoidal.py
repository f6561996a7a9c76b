"""Sinusoidal positions (arXiv:1706.03762), plain and scaled by one learned number.

Shapes: B rows, T tokens, D model dim.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from titanarch.config.errors import ConfigError
from titanarch.contract.card import Card
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.layers import local
from titanarch.contract.position import AbsolutePosition, AbsolutePositionConfig, absolute_position
from titanarch.contract.shape import ModelShape
from titanarch.models.positions.frequencies import inverse_frequencies

Theta = Annotated[float, Field(gt=1)]


def sinusoid(position_BT: Tensor, x_BTD: Tensor, theta: float) -> Tensor:
    """P[n, 2i] = sin(n theta^(-2i / D)), P[n, 2i + 1] = cos of the same; [B, T, D] like x, in fp32 or better."""
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    frequency_F = inverse_frequencies(x_BTD.shape[-1], theta, dtype=dtype, device=x_BTD.device)
    angle_BTF = position_BT.unsqueeze(-1).to(dtype) * frequency_F
    return torch.stack((angle_BTF.sin(), angle_BTF.cos()), dim=-1).flatten(-2)


def require_even(d_model: int, kind: str) -> None:
    """A ConfigError where sines and cosines cannot be paired."""
    if d_model % 2:
        raise ConfigError(
            f"position '{kind}': d_model ({d_model}) is odd, but channels come in pairs of a sine and a cosine; use an even d_model"
        )


class SinusoidalConfig(AbsolutePositionConfig):
    """[model.position.absolute] of kind sinusoidal."""

    theta: Theta = Field(10_000.0, description="longest wavelength over 2 pi, tokens")


@absolute_position("sinusoidal")
class Sinusoidal(AbsolutePosition):
    """x + P[position]; any position has an embedding."""

    Config = SinusoidalConfig
    card = Card("sinusoidal positions", "arXiv:1706.03762", "closed form")

    def __init__(self, config: SinusoidalConfig, shape: ModelShape) -> None:
        """Raises ConfigError where d_model is odd."""
        super().__init__(config, shape)
        require_even(shape.d_model, "sinusoidal")
        self.config = config

    @staticmethod
    def cost(config: SinusoidalConfig, shape: ModelShape) -> Cost:
        return Cost()

    def reset_parameters(self, init: Init) -> None:
        """No parameters."""

    def forward(self, x_BTD: Tensor, position_BT: Tensor) -> Tensor:
        return x_BTD + sinusoid(position_BT, x_BTD, self.config.theta).to(x_BTD.dtype)


class ScaledSinusoidalConfig(AbsolutePositionConfig):
    """[model.position.absolute] of kind scaled_sinusoidal."""

    theta: Theta = Field(10_000.0, description="longest wavelength over 2 pi, tokens")
    initial_scale: float | None = Field(None, description="the learned factor at the start; unset: 1 / sqrt(d_model)")


@absolute_position("scaled_sinusoidal")
class ScaledSinusoidal(AbsolutePosition):
    """x + s P[position] with one learned s."""

    Config = ScaledSinusoidalConfig
    card = Card("sinusoidal positions times a learned number", "lucidrains/x-transformers", "x-transformers ScaledSinusoidalEmbedding")

    def __init__(self, config: ScaledSinusoidalConfig, shape: ModelShape) -> None:
        """Raises ConfigError where d_model is odd."""
        super().__init__(config, shape)
        require_even(shape.d_model, "scaled_sinusoidal")
        self.config = config
        self.initial_scale = shape.d_model**-0.5 if config.initial_scale is None else config.initial_scale
        self.scale = nn.Parameter(torch.empty(1))

    @staticmethod
    def cost(config: ScaledSinusoidalConfig, shape: ModelShape) -> Cost:
        return Cost(parameters=1)

    def reset_parameters(self, init: Init) -> None:
        """The scale: ``initial_scale``, by default 1 / sqrt(d_model) as in x-transformers."""
        init.constant(self, "scale", self.initial_scale)

    def forward(self, x_BTD: Tensor, position_BT: Tensor) -> Tensor:
        return x_BTD + (local(self.scale) * sinusoid(position_BT, x_BTD, self.config.theta)).to(x_BTD.dtype)
