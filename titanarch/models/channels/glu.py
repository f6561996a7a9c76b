"""Gated linear units (arXiv:2002.05202): down(a(gate(x)) * up(x)) with a = ReLU, GELU, SiLU or nothing.

Gate and up are two matrices, because a fused one could not be divided by hidden unit.
Shapes: B rows, T tokens, D model dim, F hidden units.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from titanarch.contract.card import Card
from titanarch.contract.channel import channel_mixer
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.split import Split
from titanarch.models.activations import Approximation
from titanarch.models.channels.hidden import HiddenChannel, HiddenConfig


class GLUConfig(HiddenConfig):
    """The keys of all gated units. By default as many parameters as an mlp of 4 D units, to the rounding."""

    default_expansion = 8 / 3
    default_multiple = 64


class GLU(HiddenChannel):
    """Two projections to hidden units, combined by ``hidden``, and one back."""

    tensor_parallel: ClassVar[Mapping[str, Split]] = {"gate": Split.COLUMN("d_ff"), "up": Split.COLUMN("d_ff"), "down": Split.ROW}
    float8 = frozenset({"gate", "up", "down"})
    second_derivatives = True

    def __init__(self, config: GLUConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        D, n_units = shape.d_model, config.hidden_units(shape.d_model)
        self.gate = self.projection(D, n_units)
        self.up = self.projection(D, n_units)
        self.down = self.projection(n_units, D)

    @staticmethod
    def cost(config: GLUConfig, shape: ModelShape) -> Cost:
        D, n_units = shape.d_model, config.hidden_units(shape.d_model)
        inward = config.projection_cost(D, n_units)
        return inward + inward + config.projection_cost(n_units, D)

    def reset_parameters(self, init: Init) -> None:
        """gate and up as linears of the scheme, down as a residual output; other linear layers than dense ones their own."""
        self.gate.reset(init)
        self.up.reset(init)
        self.down.reset(init, residual_of=self.layer)

    @abstractmethod
    def hidden(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        """The hidden units, [B, T, F]."""

    def forward(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        out: Tensor = self.down(self.drop(self.hidden(self.gate(x_BTD), self.up(x_BTD)), seq))
        return out


class ReGLUConfig(GLUConfig):
    """[model.channel] of kind reglu."""


@channel_mixer("reglu")
class ReGLU(GLU):
    """relu(gate) * up."""

    Config = ReGLUConfig
    card = Card("gated linear unit with ReLU", "arXiv:2002.05202", "transformers LlamaMLP with relu")

    def hidden(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        return F.relu(gate_BTF) * up_BTF


class GEGLUConfig(GLUConfig):
    """[model.channel] of kind geglu."""

    approximate: Approximation = Field("none", description="none: exact GELU; tanh: its approximation, as in T5 1.1 and Gemma")


@channel_mixer("geglu")
class GEGLU(GLU):
    """gelu(gate) * up."""

    Config = GEGLUConfig
    card = Card("gated linear unit with GELU", "arXiv:2002.05202", "transformers LlamaMLP with gelu, T5DenseGatedActDense")
    config: GEGLUConfig

    def hidden(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        return F.gelu(gate_BTF, approximate=self.config.approximate) * up_BTF


class SwiGLUConfig(GLUConfig):
    """[model.channel] of kind swiglu."""


@channel_mixer("swiglu")
class SwiGLU(GLU):
    """silu(gate) * up."""

    Config = SwiGLUConfig
    card = Card("gated linear unit with SiLU", "arXiv:2002.05202", "transformers LlamaMLP")

    def hidden(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        return F.silu(gate_BTF) * up_BTF


class BilinearConfig(GLUConfig):
    """[model.channel] of kind bilinear."""


@channel_mixer("bilinear")
class Bilinear(GLU):
    """gate * up, no activation at all."""

    Config = BilinearConfig
    card = Card("gated linear unit without an activation", "arXiv:2002.05202", "transformers LlamaMLP with linear")

    def hidden(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        return gate_BTF * up_BTF
