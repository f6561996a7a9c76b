"""What passes beside the residual stream: values from block to block, and named losses and metrics."""

from typing import NamedTuple

import torch
from torch import Tensor


class Aux(NamedTuple):
    """An auxiliary quantity as a sum and a count, so that it can be averaged over processes and micro-batches.

    ``total``, ``counted``: scalars. ``weight``: its weight in the objective; 0 makes it a metric only.
    """

    total: Tensor
    counted: Tensor
    weight: float


class Carry(NamedTuple):
    """Passed from block to block; a block returns a new one rather than change it.

    ``values``: tensors for later blocks by name (first-layer values, a shared table). ``aux``: see Aux.
    """

    values: dict[str, Tensor]
    aux: dict[str, Aux]

    @staticmethod
    def empty() -> "Carry":
        return Carry({}, {})

    def with_value(self, name: str, value: Tensor) -> "Carry":
        return Carry({**self.values, name: value}, self.aux)

    def with_aux(self, name: str, total: Tensor, count: Tensor | float, weight: float) -> "Carry":
        """Add to the quantity ``name``; several blocks may add to the same one."""
        count = torch.as_tensor(count, dtype=torch.float32, device=total.device)
        total = total.float()
        if name in self.aux:
            total, count = total + self.aux[name].total, count + self.aux[name].counted
        return Carry(self.values, {**self.aux, name: Aux(total, count, weight)})
