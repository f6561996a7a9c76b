"""How rotary frequencies change for sequences longer than those of pretraining.

Shapes: F frequencies, half the rotated channels.
"""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from titanarch.config.registry import ComponentConfig, Registry

Factor = Annotated[float, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Length = Annotated[int, Field(gt=0)]


class RotaryScalingConfig(ComponentConfig):
    """The table of one scaling, [model.position.relative] scaling."""


class RotaryScaling(ABC):
    """Two functions of a Config; never instantiated."""

    Config: ClassVar[type[RotaryScalingConfig]]

    @staticmethod
    @abstractmethod
    def scale(config: Any, frequency_F: Tensor, theta: float) -> Tensor:
        """New frequencies, [F], from those of theta, radians a token, highest first."""

    @staticmethod
    def attention_factor(config: Any) -> float:
        """What rotated queries and keys are multiplied by."""
        return 1.0


ROTARY_SCALINGS: Registry[RotaryScaling] = Registry("rotary scaling")


class NoScalingConfig(RotaryScalingConfig):
    """No keys."""


@ROTARY_SCALINGS.register("none")
class NoScaling(RotaryScaling):
    """The frequencies as they are."""

    Config = NoScalingConfig

    @staticmethod
    def scale(config: NoScalingConfig, frequency_F: Tensor, theta: float) -> Tensor:
        return frequency_F


class InterpolationConfig(RotaryScalingConfig):
    """Position interpolation (arXiv:2306.15595)."""

    factor: Factor = Field(description="positions are divided by this: new length / old length")


@ROTARY_SCALINGS.register("interpolation")
class Interpolation(RotaryScaling):
    """All frequencies divided by the factor."""

    Config = InterpolationConfig

    @staticmethod
    def scale(config: InterpolationConfig, frequency_F: Tensor, theta: float) -> Tensor:
        return frequency_F / config.factor


class YarnConfig(RotaryScalingConfig):
    """YaRN (arXiv:2309.00071)."""

    factor: Factor = Field(description="new length / old length")
    original_length: Length = Field(description="length of pretraining, tokens")
    beta_fast: Positive = Field(32.0, description="frequencies with more turns than this in original_length are kept")
    beta_slow: Positive = Field(1.0, description="frequencies with fewer turns than this are divided by factor")
    attention_factor: Positive | None = Field(
        None, description="what rotated queries and keys are multiplied by; unset: 0.1 ln(factor) + 1"
    )

    @model_validator(mode="after")
    def _fast_above_slow(self) -> "YarnConfig":
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast ({self.beta_fast}) must exceed beta_slow ({self.beta_slow})")
        return self


@ROTARY_SCALINGS.register("yarn")
class Yarn(RotaryScaling):
    """Slow frequencies are interpolated, fast ones kept, a linear ramp over the channels in between.

    The factor of the softmax temperature goes into cosines and sines, so it meets the rotated channels of queries and
    keys alone, once each, as in Hugging Face's and the authors' code.
    """

    Config = YarnConfig

    @staticmethod
    def scale(config: YarnConfig, frequency_F: Tensor, theta: float) -> Tensor:
        n_frequencies = frequency_F.shape[0]

        def channel(turns: float) -> float:
            """The (fractional) frequency that turns so often within original_length."""
            return n_frequencies * math.log(config.original_length / (turns * 2 * math.pi)) / math.log(theta)

        low = max(math.floor(channel(config.beta_fast)), 0)
        high = min(math.ceil(channel(config.beta_slow)), 2 * n_frequencies - 1)
        width = high - low if high != low else 0.001
        index_F = torch.arange(n_frequencies, dtype=frequency_F.dtype, device=frequency_F.device)
        interpolated_F = ((index_F - low) / width).clamp(0, 1)
        return frequency_F * (interpolated_F / config.factor + (1 - interpolated_F))

    @staticmethod
    def attention_factor(config: YarnConfig) -> float:
        return 0.1 * math.log(config.factor) + 1.0 if config.attention_factor is None else config.attention_factor


class Llama3Config(RotaryScalingConfig):
    """Llama 3.1's scaling (arXiv:2407.21783)."""

    factor: Factor = Field(8.0, description="what the slow frequencies are divided by")
    low_freq_factor: Positive = Field(1.0, description="frequencies with fewer turns than this in original_length are divided")
    high_freq_factor: Positive = Field(4.0, description="frequencies with more turns than this are kept")
    original_length: Length = Field(8192, description="length of pretraining, tokens")

    @model_validator(mode="after")
    def _high_above_low(self) -> "Llama3Config":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor ({self.low_freq_factor})")
        return self


@ROTARY_SCALINGS.register("llama3")
class Llama3(RotaryScaling):
    """As YaRN without a temperature, the ramp linear in the number of turns."""

    Config = Llama3Config

    @staticmethod
    def scale(config: Llama3Config, frequency_F: Tensor, theta: float) -> Tensor:
        turns_F = frequency_F * (config.original_length / (2 * math.pi))
        kept_F = ((turns_F - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)).clamp(0, 1)
        return frequency_F * ((1 - kept_F) / config.factor + kept_F)
