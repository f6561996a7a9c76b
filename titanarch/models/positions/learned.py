"""Learned absolute positions: a table of vectors (GPT-2).

Shapes: B rows, T tokens, D model dim.
"""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from titanarch.config.errors import ConfigError
from titanarch.contract.card import Card
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.layers import local
from titanarch.contract.position import AbsolutePosition, AbsolutePositionConfig, absolute_position
from titanarch.contract.shape import ModelShape

MaxLength = Annotated[int, Field(gt=0)]


def look_up(table: nn.Embedding, position_BT: Tensor) -> Tensor:
    """Rows of the table, [B, T, D].

    A position beyond the table is a ConfigError on a CPU. A GPU cannot tell without waiting for it, so there the
    check of ``max_length`` before launch stands guard, and the kernel's own assertion behind it.
    """
    try:
        rows = F.embedding(position_BT, local(table.weight))
    except IndexError as error:
        raise ConfigError(
            f"learned positions end at {table.num_embeddings - 1}, and a token has a later one; raise max_length in "
            "[model.position.absolute], shorten the rows, or use a scheme without a table"
        ) from error
    return rows


class LearnedConfig(AbsolutePositionConfig):
    """[model.position.absolute] of kind learned."""

    max_length: MaxLength | None = Field(None, description="rows of the table, tokens; unset: the run's seq_len")


@absolute_position("learned")
class Learned(AbsolutePosition):
    """x + P[position] with a learned table P; there is nothing beyond its last row."""

    Config = LearnedConfig
    card = Card("a learned table of positions", "arXiv:1705.03122", "transformers GPT2LMHeadModel")

    def __init__(self, config: LearnedConfig, shape: ModelShape) -> None:
        super().__init__(config, shape)
        self.table = nn.Embedding(config.max_length or shape.seq_len, shape.d_model)

    @staticmethod
    def cost(config: LearnedConfig, shape: ModelShape) -> Cost:
        return Cost(parameters=(config.max_length or shape.seq_len) * shape.d_model)

    def reset_parameters(self, init: Init) -> None:
        """The table: as an embedding of the scheme."""
        init.embedding(self.table)

    def max_length(self) -> int | None:
        return self.table.num_embeddings

    def forward(self, x_BTD: Tensor, position_BT: Tensor) -> Tensor:
        """Raises ConfigError for a position beyond the table (on a CPU; see ``look_up``)."""
        return x_BTD + look_up(self.table, position_BT).to(x_BTD.dtype)
