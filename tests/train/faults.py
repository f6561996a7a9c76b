"""Faults in a run's steps, by the numbers of their rows, so that they are there again whenever the rows are."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from titanarch.contract.model import Objective
from titanarch.contract.sequence import SequenceInfo
from titanarch.data.batch import Batch
from titanarch.data.loader import IndexedLoader
from titanarch.data.row_loader import RowLoader
from titanarch.models.language_model import CausalLanguageModel

Fault = Callable[[nn.Module, Objective], Objective]

POISONED = "layers.1.channel.down"
"""The module whose weight gets a gradient that is not a number."""


class _Poison(torch.autograd.Function):
    """Zero, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.shape = weight.shape
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.full(ctx.shape, torch.nan, dtype=grads[0].dtype)


def inf_loss(_model: nn.Module, objective: Objective) -> Objective:
    return objective._replace(total=objective.total * torch.inf, loss_sum=objective.loss_sum * torch.inf)


def spike(_model: nn.Module, objective: Objective) -> Objective:
    return objective._replace(total=objective.total * 1e4)


def faulty_forward(faults: dict[int, str]) -> Callable[..., Objective]:
    """The forward of a language model in which ``faults`` happen: kinds, by the number of a row."""
    forward = CausalLanguageModel.forward

    def wrapped(self: CausalLanguageModel, tokens: Tensor, seq: SequenceInfo, labels: Tensor, z_weight: float = 0.0) -> Objective:
        kinds = {faults[row] for row in seq.row_B.tolist() if row in faults}
        handles = []
        if "nan" in kinds:
            module = self.get_submodule(POISONED)
            handles.append(module.register_forward_hook(lambda m, _i, out: out + _Poison.apply(m.weight)))
        objective = forward(self, tokens, seq, labels, z_weight)
        for handle in handles:
            handle.remove()
        for kind in kinds - {"nan"}:
            objective = {"inf": inf_loss, "spike": spike}[kind](self, objective)
        return objective

    return wrapped


def without_rows(rows: Collection[int]) -> Callable[[RowLoader], Batch]:
    """A loader's ``__next__`` that never gives a step that holds one of ``rows``."""
    following = IndexedLoader.__next__

    def wrapped(self: RowLoader) -> Batch:
        while self._micro_batch == 0 and any(self.next_row <= row < self.next_row + self.layout.global_batch_size for row in rows):
            for _ in range(self.accumulation_steps):
                following(self)
        return following(self)

    return wrapped
