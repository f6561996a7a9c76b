"""What channel mixers with hidden units share: how many there are, and their dropout.

Shapes: B rows, T tokens, D model dim, F hidden units.
"""

import math
from typing import Annotated, ClassVar, TypeVar

from pydantic import Field, model_validator
from torch import Tensor

from titanarch.config.errors import ConfigError
from titanarch.contract.channel import Activation, ChannelConfig, ChannelMixer
from titanarch.contract.cost import Cost
from titanarch.contract.linear import LINEARS, LinearConfig, LinearLayer
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.models.block import SITES_A_BLOCK
from titanarch.models.linears.dense import DenseConfig
from titanarch.ops.counter_random import dropout

Positive = Annotated[int, Field(gt=0)]


class HiddenConfig(ChannelConfig):
    """The keys of a channel mixer with hidden units."""

    default_expansion: ClassVar[float]
    default_multiple: ClassVar[int]

    d_ff: Positive | None = Field(None, description="hidden units; unset: expansion * d_model, rounded up to a multiple of multiple_of")
    expansion: Annotated[float, Field(gt=0)] | None = Field(None, description="hidden units / d_model; unset: 4 for mlp, 8/3 with a gate")
    multiple_of: Positive | None = Field(
        None, description="expansion * d_model is rounded up to a multiple of this, units; unset: 1 for mlp, 64 with a gate"
    )
    bias: bool = Field(False, description="biases on all projections")
    linear: Annotated[LinearConfig, LINEARS] = Field(DenseConfig(), description="what all projections are made of")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="probability of dropping a hidden unit, after the activation")

    @model_validator(mode="after")
    def _one_size(self) -> "HiddenConfig":
        for name, value in (("expansion", self.expansion), ("multiple_of", self.multiple_of)):
            if self.d_ff is not None and value is not None:
                raise ValueError(f"d_ff ({self.d_ff}) and {name} ({value}) both say how many hidden units there are; give one of them")
        return self

    def hidden_units(self, d_model: int) -> int:
        if self.d_ff is not None:
            return self.d_ff
        multiple = self.multiple_of or self.default_multiple
        # Rounded first: 8/3 * 768 must not end one rounding error above 2,048.
        return multiple * math.ceil(round((self.expansion or self.default_expansion) * d_model / multiple, 6))

    def projection_cost(self, d_in: int, d_out: int) -> Cost:
        """Of one projection."""
        return LINEARS.of(self.linear).cost(self.linear, d_in, d_out, bias=self.bias)


C = TypeVar("C", bound=HiddenConfig)


def with_hidden_units(config: C, shape: ModelShape) -> C:
    """The same table with ``d_ff`` filled in: what ``Split.COLUMN("d_ff")`` counts."""
    return config.model_copy(update={"d_ff": config.hidden_units(shape.d_model), "expansion": None, "multiple_of": None})


class HiddenChannel(ChannelMixer):
    """``config`` holds the resolved ``d_ff``. Subclasses allocate ``down`` and their other projections."""

    config: HiddenConfig

    def __init__(self, config: HiddenConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        self.config = with_hidden_units(config, shape)
        self.layer = layer

    def projection(self, d_in: int, d_out: int) -> LinearLayer:
        """A projection of the kind that the table asks for."""
        return LINEARS.of(self.config.linear)(self.config.linear, d_in, d_out, bias=self.config.bias)

    def check_groups(self, activation: Activation, n_units: int) -> None:
        """ConfigError where ``activation`` reads groups of units and those do not make whole ones."""
        if activation.unit_group is not None and n_units % activation.unit_group:
            raise ConfigError(
                f"activation '{activation.config.kind}': {n_units} hidden units are no multiple of {activation.unit_group}, which it reads "
                "together; change d_ff"
            )

    def drop(self, hidden_BTF: Tensor, seq: SequenceInfo) -> Tensor:
        """Dropout of hidden units, where the sequence has a seed; a site of its own in the block's."""
        if self.config.dropout == 0 or seq.seed is None:
            return hidden_BTF
        return dropout(
            hidden_BTF,
            self.config.dropout,
            seed=seq.seed,
            row_B=seq.row_B,
            index_T=seq.index_T,
            site=SITES_A_BLOCK * (self.layer + 1) + 2,
            first_channel=self.first_unit,
        )
