"""Continuous position bias (arXiv:2111.09883, in one dimension): a small network maps the distance to a bias a head.

b(d) = W_out relu(W_in phi(d) + b_in) + b_out, with phi the distance, its signed logarithm, or Fourier features; each
attention layer has a network of its own. A ReLU network of one number is piecewise linear, so beyond the trained
distances linear_cpb is ALiBi with learned slopes of either sign. Against SwinV2: no bounds on input or output.

The network runs once a micro-batch on the distances alone, in fp32. Shapes: H heads, N distances, F features.
"""

import math
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from titanarch.contract.card import Card
from titanarch.contract.cost import Cost, linear_cost
from titanarch.contract.init import Init
from titanarch.contract.position import RelativePosition, RelativePositionConfig, relative_position
from titanarch.contract.roles import VECTOR, Role
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.models.positions.frequencies import inverse_frequencies

Positive = Annotated[int, Field(gt=0)]


class BiasLinear(nn.Linear):
    """A linear layer of a bias network, fp32. Without weight decay, as in SwinV2, and not for Muon."""

    roles: ClassVar[dict[str, Role]] = {"weight": VECTOR, "bias": VECTOR}

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, dtype=torch.float32)

    def forward(self, x_NF: Tensor) -> Tensor:
        # One feature needs no matrix product, and a product in TF32 would round distances above 2,048.
        return x_NF * self.weight.t() + self.bias if self.in_features == 1 else F.linear(x_NF, self.weight, self.bias)


class CPBConfig(RelativePositionConfig):
    """The keys that all networks share."""

    hidden: Positive = Field(256, description="width of the network's hidden layers, units")
    depth: Positive = Field(1, description="hidden layers of the network")

    def n_features(self) -> int:
        return 1


class ScalableCPBConfig(CPBConfig):
    """Networks whose input may be scaled."""

    distance_scale: Literal["none", "seq_len"] = Field(
        "none", description="seq_len: divide distances by the run's seq_len first, so that biases start of order 1 at any length"
    )

    def divisor(self, shape: ModelShape) -> float:
        return float(shape.seq_len) if self.distance_scale == "seq_len" else 1.0


class ContinuousPositionBias(RelativePosition):
    """The network; subclasses say what it sees of a distance."""

    has_table = True
    learned_table = True

    def __init__(self, config: CPBConfig, shape: ModelShape, layer: int, n_heads: int, head_dim: int) -> None:
        super().__init__(config, shape, layer, n_heads, head_dim)
        sizes = _sizes(config, n_heads)
        self.layers = nn.ModuleList(BiasLinear(n_in, n_out) for n_in, n_out in pairwise(sizes))

    @staticmethod
    def cost(config: CPBConfig, shape: ModelShape, layer: int, n_heads: int, head_dim: int) -> Cost:
        """FLOPs as if the table were made for every row: an upper bound, since it is made once a micro-batch."""
        sizes = _sizes(config, n_heads)
        return sum((linear_cost(n_in, n_out, bias=True) for n_in, n_out in pairwise(sizes)), Cost())

    def reset_parameters(self, init: Init) -> None:
        """Weights and biases U(+-1/sqrt(fan_in)), PyTorch's default, whatever the scheme."""
        for linear in self._linears():
            bound = 1 / math.sqrt(linear.in_features)
            init.uniform(linear, "weight", bound)
            init.uniform(linear, "bias", bound)

    def features(self, distance_N: Tensor) -> Tensor:
        """[N, F] of signed distances, query - key."""
        raise NotImplementedError

    def forward(self, n_distances: int, bidirectional: bool, carry: Carry) -> tuple[Tensor, Carry]:
        """[H, N] in the parameters' dtype, fp32; see ``RelativePosition.forward``."""
        first, *others = self._linears()
        start = 1 - n_distances if bidirectional else 0
        distance_N = torch.arange(start, n_distances, dtype=first.weight.dtype, device=first.weight.device)
        x = first(self.features(distance_N))
        for linear in others:
            x = linear(F.relu(x))
        return x.t().contiguous(), carry

    def _linears(self) -> list[BiasLinear]:
        return [linear for linear in self.layers if isinstance(linear, BiasLinear)]


def _sizes(config: CPBConfig, n_heads: int) -> list[int]:
    """Widths of the network from its input to its output."""
    return [config.n_features(), *[config.hidden] * config.depth, n_heads]


class DistanceCPB(ContinuousPositionBias):
    """phi(d) = d, divided by the run's length if so configured."""

    def __init__(self, config: ScalableCPBConfig, shape: ModelShape, layer: int, n_heads: int, head_dim: int) -> None:
        super().__init__(config, shape, layer, n_heads, head_dim)
        self.divisor = config.divisor(shape)

    def features(self, distance_N: Tensor) -> Tensor:
        return distance_N[:, None] / self.divisor


class LinearCPBConfig(ScalableCPBConfig):
    """[model.position.relative] of kind linear_cpb."""


@relative_position("linear_cpb")
class LinearCPB(DistanceCPB):
    """phi(d) = d. Unscaled, biases start with a standard deviation of about |d| / 4."""

    Config = LinearCPBConfig
    card = Card(
        "continuous position bias: a network of the distance", "arXiv:2111.09883, in one dimension", "x-transformers DynamicPositionBias"
    )


class LargeLinearCPBConfig(ScalableCPBConfig):
    """[model.position.relative] of kind linear_cpb_large."""

    hidden: Positive = Field(1024, description="width of the network's hidden layers, units")


@relative_position("linear_cpb_large")
class LargeLinearCPB(DistanceCPB):
    """linear_cpb with a bigger network. The notes name it without a size; 1,024 units in one layer is our choice."""

    Config = LargeLinearCPBConfig
    card = Card(
        "linear_cpb with a bigger network", "position study (research notes)", "x-transformers DynamicPositionBias, through linear_cpb"
    )


class LogCPBConfig(ScalableCPBConfig):
    """[model.position.relative] of kind log_cpb."""


@relative_position("log_cpb")
class LogCPB(DistanceCPB):
    """phi(d) = sign(d) ln(1 + |d|)."""

    Config = LogCPBConfig
    card = Card(
        "continuous position bias of the distance's logarithm", "arXiv:2111.09883, in one dimension", "x-transformers DynamicPositionBias"
    )

    def features(self, distance_N: Tensor) -> Tensor:
        distance_N1 = super().features(distance_N)
        return distance_N1.sign() * distance_N1.abs().log1p()


class FourierCPBConfig(CPBConfig):
    """[model.position.relative] of kind fourier_cpb."""

    n_frequencies: Positive = Field(8, description="frequencies; each gives a sine and a cosine")
    theta: Annotated[float, Field(gt=1)] = Field(
        20_000.0, description="base of the series of frequencies: theta^(-k / n_frequencies) radians a token"
    )

    def n_features(self) -> int:
        return 2 * self.n_frequencies


@relative_position("fourier_cpb")
class FourierCPB(ContinuousPositionBias):
    """phi(d) = sin and cos of d theta^(-k / n), k = 0 .. n - 1. Bounded, so far distances get arbitrary biases."""

    Config = FourierCPBConfig
    card = Card("continuous position bias of sines and cosines", "position study (research notes)", "closed form")

    def __init__(self, config: FourierCPBConfig, shape: ModelShape, layer: int, n_heads: int, head_dim: int) -> None:
        super().__init__(config, shape, layer, n_heads, head_dim)
        self.n_features, self.theta = config.n_features(), config.theta

    def features(self, distance_N: Tensor) -> Tensor:
        angle_NF = distance_N[:, None] * inverse_frequencies(self.n_features, self.theta, dtype=distance_N.dtype, device=distance_N.device)
        return torch.cat((angle_NF.sin(), angle_NF.cos()), dim=-1)
