"""Activations: what makes hidden units nonlinear."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from titanarch.config.errors import ConfigError, did_you_mean
from titanarch.config.section import ListOf
from titanarch.contract.card import Card
from titanarch.contract.channel import ACTIVATIONS, Activation, ActivationConfig, activation

Approximation = Literal["none", "tanh"]


class IdentityConfig(ActivationConfig):
    """No keys."""


@activation("identity")
class Identity(Activation):
    """x."""

    Config = IdentityConfig
    card = Card("x", "-", "transformers ACT2FN linear")

    def forward(self, x: Tensor) -> Tensor:
        return x


class ReLUConfig(ActivationConfig):
    """No keys."""


@activation("relu")
class ReLU(Activation):
    """max(x, 0)."""

    Config = ReLUConfig
    card = Card("max(x, 0)", "-", "transformers ACT2FN relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class SquaredReLUConfig(ActivationConfig):
    """No keys."""


@activation("relu2")
class SquaredReLU(Activation):
    """max(x, 0)^2 (arXiv:2109.08668)."""

    Config = SquaredReLUConfig
    card = Card("max(x, 0) squared", "arXiv:2109.08668", "transformers ACT2FN relu2")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class GELUConfig(ActivationConfig):
    """GELU (arXiv:1606.08415)."""

    approximate: Approximation = Field(
        "none", description="none: x times the normal distribution function; tanh: GPT-2's approximation of it"
    )


@activation("gelu")
class GELU(Activation):
    """x Phi(x)."""

    Config = GELUConfig
    card = Card("GELU, exact or by tanh", "arXiv:1606.08415", "transformers ACT2FN gelu, gelu_new")
    config: GELUConfig

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate=self.config.approximate)


class SiLUConfig(ActivationConfig):
    """No keys."""


@activation("silu")
class SiLU(Activation):
    """x sigmoid(x)."""

    Config = SiLUConfig
    card = Card("SiLU (Swish)", "arXiv:1702.03118", "transformers ACT2FN silu")

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class SigmoidConfig(ActivationConfig):
    """No keys."""


@activation("sigmoid")
class Sigmoid(Activation):
    """1 / (1 + exp(-x))."""

    Config = SigmoidConfig
    card = Card("sigmoid", "-", "transformers ACT2FN sigmoid")

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


class MixedConfig(ActivationConfig):
    """Several activations across units."""

    activations: ListOf[str] = Field(description="names of two or more activations; unit j takes number j modulo how many there are")

    @model_validator(mode="after")
    def _known(self) -> "MixedConfig":
        if len(self.activations) < 2:
            raise ValueError(f"activations ({list(self.activations)}) must name two or more")
        allowed = set(ACTIVATIONS) - {"mixed"}
        for name in self.activations:
            if name not in allowed:
                raise ValueError(f"activations: '{name}' cannot be mixed{did_you_mean(name, allowed)}")
        return self


@activation("mixed")
class Mixed(Activation):
    """Unit j takes activation j mod n, so the groups are equal, and any slice of n k units is mixed as the whole is.

    The activations have their default settings. Raises ConfigError where n does not divide the units.
    """

    Config = MixedConfig
    card = Card("several activations across units", "march (research notes)", "closed form")

    def __init__(self, config: MixedConfig) -> None:
        super().__init__(config)
        self.names = config.activations
        parts = [ACTIVATIONS[name](ACTIVATIONS[name].Config()) for name in self.names]
        self.parts = nn.ModuleList(parts)
        groups = [part.unit_group for part in parts if part.unit_group is not None]
        self.unit_group = len(parts) * math.lcm(*groups) if len(groups) == len(parts) else None

    def forward(self, x: Tensor) -> Tensor:
        n = len(self.parts)
        if x.shape[-1] % n:
            raise ConfigError(
                f"activation 'mixed': {x.shape[-1]} hidden units on a process are no multiple of its {n} activations; change d_ff"
            )
        units = x.unflatten(-1, (-1, n)).unbind(-1)
        return torch.stack([part(unit) for part, unit in zip(self.parts, units, strict=True)], dim=-1).flatten(-2)
