"""Norms over the last dimension: LayerNorm, RMSNorm, none."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from titanarch.contract.card import Card
from titanarch.contract.init import Init
from titanarch.contract.layers import local
from titanarch.contract.norm import Norm, NormConfig, norm

Epsilon = Annotated[float, Field(gt=0)]


class LayerNormConfig(NormConfig):
    """LayerNorm (arXiv:1607.06450)."""

    eps: Epsilon = Field(1e-5, description="added to the variance")
    bias: bool = Field(True, description="a learned bias a channel")


@norm("layernorm")
class LayerNorm(Norm):
    """(x - mean) / sqrt(variance + eps) * weight + bias. torch computes the statistics of low precisions in fp32."""

    Config = LayerNormConfig
    card = Card("LayerNorm", "arXiv:1607.06450", "torch.nn.LayerNorm")

    def __init__(self, config: LayerNormConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.eps = config.eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if config.bias else None

    @staticmethod
    def n_parameters(config: LayerNormConfig, dim: int) -> int:
        return dim * (1 + config.bias)

    def reset_parameters(self, init: Init) -> None:
        """Weight 1, bias 0."""
        init.constant(self, "weight", 1.0)
        if self.bias is not None:
            init.constant(self, "bias", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = local(self.weight).to(x.dtype), None if self.bias is None else local(self.bias).to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


class RMSNormConfig(NormConfig):
    """RMSNorm (arXiv:1910.07467)."""

    eps: Epsilon = Field(1e-5, description="added to the mean square")
    gain: bool = Field(True, description="a learned factor a channel")


@norm("rmsnorm")
class RMSNorm(Norm):
    """x / sqrt(mean x^2 + eps) * weight. torch computes the statistics of low precisions in fp32."""

    Config = RMSNormConfig
    card = Card("RMSNorm", "arXiv:1910.07467", "closed form; transformers Llama")

    def __init__(self, config: RMSNormConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.dim = dim
        self.eps = config.eps
        self.weight = nn.Parameter(torch.empty(dim)) if config.gain else None

    @staticmethod
    def n_parameters(config: RMSNormConfig, dim: int) -> int:
        return dim * config.gain

    def reset_parameters(self, init: Init) -> None:
        """Weight 1."""
        if self.weight is not None:
            init.constant(self, "weight", 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.dim,), None if self.weight is None else local(self.weight).to(x.dtype), self.eps)


class NoNormConfig(NormConfig):
    """No keys."""


@norm("none")
class NoNorm(Norm):
    """x as it is."""

    Config = NoNormConfig
    card = Card("no norm", "-", "closed form")

    def __init__(self, config: NoNormConfig, dim: int) -> None:
        super().__init__(config, dim)

    @staticmethod
    def n_parameters(config: NoNormConfig, dim: int) -> int:
        return 0

    def reset_parameters(self, init: Init) -> None:
        """No parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return x
