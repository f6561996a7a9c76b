"""T5's relative bias (arXiv:1910.10683): one learned number a head for each bucket of distances.

Half of the buckets hold one distance each, the other half grow logarithmically up to ``max_distance``; the last also
takes everything beyond. Looking both ways, the halves of the table serve keys before and after the query. T5 itself
does not scale its logits: set the mixer's ``scale`` to 1 for that.

Shapes: H heads, N distances, S buckets of one direction.
"""

from bisect import bisect_left
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from titanarch.contract.card import Card
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.position import RelativePosition, RelativePositionConfig, relative_position
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry


def bucket_starts(n_buckets: int, max_distance: int) -> list[int]:
    """The smallest distance in each bucket of one direction; an empty bucket starts where the next one does.

    Bucket e + k, with e = n_buckets // 2 exact ones, starts at the smallest d with (d/e)^(n-e) >= (max_distance/e)^k,
    decided in integers, because in floating point the distances on an edge fall on either side by chance.
    """
    exact = n_buckets // 2
    large = n_buckets - exact

    def reached(k: int) -> int:
        edge = max_distance**k * exact**large
        return bisect_left(range(max_distance), True, key=lambda d: d**large * exact**k >= edge)

    return [*range(exact), *(reached(k) for k in range(large))]


def spread(table_HS: Tensor, starts: list[int], n_distances: int) -> Tensor:
    """Each bucket's column repeated over its distances 0 .. n_distances - 1: [H, N].

    Runs of columns instead of an index: the backward pass is a plain sum, the same in every run.
    """
    ends = [*starts[1:], n_distances]
    runs = [
        column.expand(-1, min(end, n_distances) - start)
        for column, start, end in zip(table_HS.split(1, dim=1), starts, ends, strict=True)
        if start < min(end, n_distances)
    ]
    return torch.cat(runs, dim=1)


class T5Config(RelativePositionConfig):
    """[model.position.relative] of kind t5."""

    n_buckets: Annotated[int, Field(ge=4, multiple_of=2)] = Field(32, description="rows of the table, an even number")
    max_distance: Annotated[int, Field(gt=0)] = Field(128, description="distance from which all share the last bucket, tokens")
    shared: bool = Field(True, description="one table in the first layer of the mixer's name serves all of them; false: a table a layer")

    @model_validator(mode="after")
    def _distances_beyond_exact(self) -> "T5Config":
        if self.max_distance <= self.n_buckets // 2:
            raise ValueError(
                f"max_distance ({self.max_distance}) must exceed n_buckets / 2 ({self.n_buckets // 2}), "
                "the distances that have buckets of their own"
            )
        return self

    def owns_table(self, shape: ModelShape, layer: int) -> bool:
        return not self.shared or shape.is_first_of_its_name(layer)


@relative_position("t5")
class T5Bias(RelativePosition):
    """The table of the first layer of a mixer's name, handed upward through the carry."""

    Config = T5Config
    card = Card("T5's bias: a learned number a bucket of distances", "arXiv:1910.10683", "transformers T5Attention")
    has_table = True
    learned_table = True

    def __init__(self, config: T5Config, shape: ModelShape, layer: int, n_heads: int, head_dim: int) -> None:
        super().__init__(config, shape, layer, n_heads, head_dim)
        self.config = config
        self.shared_name = f"t5_table/{shape.layers[layer]}"
        self.std = shape.d_model**-0.5
        self.starts = bucket_starts(config.n_buckets, config.max_distance)
        self.half_starts = bucket_starts(config.n_buckets // 2, config.max_distance)
        self.table_HS = (
            nn.Parameter(torch.empty(n_heads, config.n_buckets, dtype=torch.float32)) if config.owns_table(shape, layer) else None
        )

    @staticmethod
    def cost(config: T5Config, shape: ModelShape, layer: int, n_heads: int, head_dim: int) -> Cost:
        return Cost(parameters=n_heads * config.n_buckets * config.owns_table(shape, layer))

    def reset_parameters(self, init: Init) -> None:
        """The table: N(0, 1/D) as in T5, whatever the scheme; nothing in a layer that shares one."""
        if self.table_HS is not None:
            init.normal(self, "table_HS", self.std)

    def forward(self, n_distances: int, bidirectional: bool, carry: Carry) -> tuple[Tensor, Carry]:
        """fp32 [H, N]; see ``RelativePosition.forward``."""
        if self.table_HS is None:
            bias_HN = carry.values[self.shared_name]
            expected = 2 * n_distances - 1 if bidirectional else n_distances
            assert bias_HN.shape[1] == expected, f"the shared T5 table has {bias_HN.shape[1]} distances, this layer needs {expected}"
            return bias_HN, carry
        bias_HN = self._bias(self.table_HS, n_distances, bidirectional)
        return bias_HN, carry.with_value(self.shared_name, bias_HN) if self.config.shared else carry

    def _bias(self, table_HS: Tensor, n_distances: int, bidirectional: bool) -> Tensor:
        if not bidirectional:
            return spread(table_HS, self.starts, n_distances)
        before, after = table_HS.chunk(2, dim=1)
        keys_after = spread(after, self.half_starts, n_distances)[:, 1:].flip(1)
        return torch.cat((keys_after, spread(before, self.half_starts, n_distances)), dim=1)
