"""Rotary positions (arXiv:2104.09864): pairs of channels of queries and keys turn with the position.

Shapes: B rows, T tokens, H query heads, G key heads, K head dim, R rotated channels, F = R/2 frequencies.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from titanarch.config.errors import ConfigError
from titanarch.contract.card import Card
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.position import RelativePosition, RelativePositionConfig, relative_position
from titanarch.contract.shape import ModelShape
from titanarch.models.positions.frequencies import inverse_frequencies
from titanarch.models.positions.rotary_scaling import ROTARY_SCALINGS, NoScalingConfig, RotaryScalingConfig

Layout = Literal["half_split", "interleaved"]


def turn(x_BTHK: Tensor, cos_BT1F: Tensor, sin_BT1F: Tensor, layout: Layout) -> Tensor:
    """The first 2F channels of each head turned, the rest as they are; in x's dtype, computed in fp32 or better."""
    n_rotated = 2 * cos_BT1F.shape[-1]
    rotated = x_BTHK[..., :n_rotated]
    if layout == "half_split":
        a, b = rotated.chunk(2, dim=-1)
    else:
        a, b = rotated.unflatten(-1, (-1, 2)).unbind(-1)
    pair = (a * cos_BT1F - b * sin_BT1F, b * cos_BT1F + a * sin_BT1F)
    turned = torch.cat(pair, dim=-1) if layout == "half_split" else torch.stack(pair, dim=-1).flatten(-2)
    turned = turned.to(x_BTHK.dtype)
    return turned if n_rotated == x_BTHK.shape[-1] else torch.cat((turned, x_BTHK[..., n_rotated:]), dim=-1)


class RotaryConfig(RelativePositionConfig):
    """[model.position.relative] of kind rotary."""

    theta: Annotated[float, Field(gt=1)] = Field(10_000.0, description="longest wavelength over 2 pi, tokens")
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="share of each head's channels, the first ones, that turn")
    layout: Layout = Field(
        "half_split",
        description="channels that form a pair: half_split (i, i + R/2) as in NeoX and Llama-HF, interleaved (2i, 2i + 1) as in GPT-J",
    )
    scaling: Annotated[RotaryScalingConfig, ROTARY_SCALINGS] = Field(
        NoScalingConfig(), description="how frequencies change for longer sequences: none, interpolation, yarn, llama3"
    )

    def rotated_channels(self, head_dim: int) -> int:
        """How many channels of a head turn; a ConfigError unless that is an even integer."""
        exact = self.fraction * head_dim
        channels = round(exact)
        if abs(exact - channels) > 1e-6 or channels % 2 or channels == 0:
            raise ConfigError(
                f"position 'rotary': fraction ({self.fraction}) of head_dim ({head_dim}) is {exact:g} channels, but they turn in pairs; "
                "choose a fraction or a head_dim that gives an even number"
            )
        return channels


@relative_position("rotary")
class Rotary(RelativePosition):
    """Turns the pair i of a head by position * frequency_i. Angles, cosines and sines are fp32, or fp64 for fp64 queries.

    Two matrices of half the rotated channels are made a layer from the positions; nothing is cached, so any position
    has a rotation.
    """

    Config = RotaryConfig
    card = Card(
        "rotary positions, partial or whole, with scaling for long contexts",
        "arXiv:2104.09864",
        "transformers Llama, GPT-NeoX, rope utilities; rotary_embedding_torch",
    )
    rotates = True

    def __init__(self, config: RotaryConfig, shape: ModelShape, layer: int, n_heads: int, head_dim: int) -> None:
        """Raises ConfigError where the rotated channels are no even number."""
        super().__init__(config, shape, layer, n_heads, head_dim)
        self.config = config
        self.n_rotated = config.rotated_channels(head_dim)
        self.attention_factor = ROTARY_SCALINGS.of(config.scaling).attention_factor(config.scaling)

    @staticmethod
    def cost(config: RotaryConfig, shape: ModelShape, layer: int, n_heads: int, head_dim: int) -> Cost:
        return Cost()

    def reset_parameters(self, init: Init) -> None:
        """No parameters."""

    def frequencies(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Radians a token, [F], highest first."""
        frequency_F = inverse_frequencies(self.n_rotated, self.config.theta, dtype=dtype, device=device)
        return ROTARY_SCALINGS.of(self.config.scaling).scale(self.config.scaling, frequency_F, self.config.theta)

    def rotate(self, q_BTHK: Tensor, k_BTGK: Tensor, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Both turned by their positions, in their dtypes."""
        dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
        angle_BT1F = position_BT[..., None, None].to(dtype) * self.frequencies(dtype, q_BTHK.device)
        cos_BT1F, sin_BT1F = angle_BT1F.cos(), angle_BT1F.sin()
        if self.attention_factor != 1.0:
            cos_BT1F, sin_BT1F = cos_BT1F * self.attention_factor, sin_BT1F * self.attention_factor
        layout = self.config.layout
        return turn(q_BTHK, cos_BT1F, sin_BT1F, layout), turn(k_BTGK, cos_BT1F, sin_BT1F, layout)
