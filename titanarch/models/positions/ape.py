"""The absolute position variants of the march experiments: how token and position are put together.

The notes say only that APESumOverAverage recombines token and position by a sum, that APEUnitVariance rescales to unit
variance, and that both did worse than their baseline. march's published history defines them: its baseline is the
average (x + P) / 2 with a learned P ~ N(0, 1/D); "sum over average" takes x + P instead, with the same P; "unit
variance" keeps the average and draws P ~ N(0, 1), the scale of its token embeddings. Hence:

    ape_average (the baseline)   (x + P) / 2   variance of P at the start 1/D
    ape_sum_over_average          x + P        1/D
    ape_unit_variance            (x + P) / 2   1

``base = "sinusoidal"`` is our own addition: P is the fixed sinusoid of theta = 10,000, whose mean square is 1/2, times
the constant that gives it the variance above.

Shapes: B rows, T tokens, D model dim.
"""

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from titanarch.contract.card import Card
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.position import AbsolutePosition, AbsolutePositionConfig, absolute_position
from titanarch.contract.shape import ModelShape
from titanarch.models.positions.learned import MaxLength, look_up
from titanarch.models.positions.sinusoidal import require_even, sinusoid


class CombinedPositionConfig(AbsolutePositionConfig):
    """The keys that the three variants share."""

    base: Literal["learned", "sinusoidal"] = Field("learned", description="where P comes from: a learned table or fixed sinusoids")
    max_length: MaxLength | None = Field(None, description="rows of the learned table, tokens; unset: the run's seq_len")

    @model_validator(mode="after")
    def _no_rows_without_table(self) -> "CombinedPositionConfig":
        if self.base == "sinusoidal" and self.max_length is not None:
            raise ValueError(
                f"max_length ({self.max_length}) counts the rows of a learned table; base = 'sinusoidal' has none, so leave it out"
            )
        return self

    def rows(self, shape: ModelShape) -> int:
        """Rows of the learned table; 0 where there is none."""
        return 0 if self.base == "sinusoidal" else self.max_length or shape.seq_len


class CombinedPosition(AbsolutePosition):
    """c (x + P[position]) with c = 1/2 or 1."""

    average: ClassVar[bool]
    unit_variance: ClassVar[bool]

    def __init__(self, config: CombinedPositionConfig, shape: ModelShape) -> None:
        """Raises ConfigError for sinusoids where d_model is odd."""
        super().__init__(config, shape)
        self.std = 1.0 if self.unit_variance else shape.d_model**-0.5
        self.table = nn.Embedding(config.rows(shape), shape.d_model) if config.base == "learned" else None
        if self.table is None:
            require_even(shape.d_model, config.kind)

    @staticmethod
    def cost(config: CombinedPositionConfig, shape: ModelShape) -> Cost:
        return Cost(parameters=config.rows(shape) * shape.d_model)

    def reset_parameters(self, init: Init) -> None:
        """A learned table: N(0, 1/D), or N(0, 1) for unit variance, whatever the scheme."""
        if self.table is not None:
            init.normal(self.table, "weight", self.std)

    def max_length(self) -> int | None:
        return None if self.table is None else self.table.num_embeddings

    def forward(self, x_BTD: Tensor, position_BT: Tensor) -> Tensor:
        """Raises ConfigError for a position beyond a learned table (on a CPU; see ``look_up``)."""
        if self.table is None:
            P_BTD = sinusoid(position_BT, x_BTD, 10_000.0) * (math.sqrt(2.0) * self.std)
        else:
            P_BTD = look_up(self.table, position_BT)
        total_BTD = x_BTD + P_BTD.to(x_BTD.dtype)
        return total_BTD / 2 if self.average else total_BTD


class AverageConfig(CombinedPositionConfig):
    """[model.position.absolute] of kind ape_average."""


@absolute_position("ape_average")
class Average(CombinedPosition):
    """march's baseline."""

    Config = AverageConfig
    card = Card("the average of token and position", "march (research notes)", "closed form")
    average = True
    unit_variance = False


class SumOverAverageConfig(CombinedPositionConfig):
    """[model.position.absolute] of kind ape_sum_over_average."""


@absolute_position("ape_sum_over_average")
class SumOverAverage(CombinedPosition):
    """A sum in place of the average."""

    Config = SumOverAverageConfig
    card = Card("the sum of token and position", "march (research notes)", "closed form")
    average = False
    unit_variance = False


class UnitVarianceConfig(CombinedPositionConfig):
    """[model.position.absolute] of kind ape_unit_variance."""


@absolute_position("ape_unit_variance")
class UnitVariance(CombinedPosition):
    """The average, with positions of unit variance."""

    Config = UnitVarianceConfig
    card = Card("the average, with positions of unit variance", "march (research notes)", "closed form")
    average = True
    unit_variance = True
