"""Counts of tokens over the processes that divide them: what ``contract.experts.TokenCounts`` sums."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from titanarch.contract.experts import TokenCounts
from titanarch.contract.model import Model
from titanarch.parallel.collectives import sum_parts
from titanarch.parallel.mesh import Mesh


class SumOver:
    """Sums a tensor over each of ``groups`` in turn, without gradients."""

    def __init__(self, groups: list[ProcessGroup]) -> None:
        self.groups = groups

    def __call__(self, count: Tensor) -> Tensor:
        with torch.no_grad():
            for group in self.groups:
                count = sum_parts(count, group)
        return count


def sum_token_counts(model: Model, mesh: Mesh) -> None:
    """Let every TokenCounts of ``model`` reach the other tokens. Before compile."""
    context = [mesh.context_group] if mesh.degrees.cp > 1 else []
    data = [mesh.rows["dp"].get_group()] if mesh.degrees.data_parallel > 1 else []
    for module in model.modules():
        if isinstance(module, TokenCounts):
            module.sum_over_rows = SumOver(context) if context else None
            module.sum_over_batch = SumOver([*context, *data]) if context or data else None
