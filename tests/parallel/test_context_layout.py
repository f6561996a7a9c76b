"""Tokens from before a part: ``SequenceInfo.previous`` on several processes is that of one."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import run_distributed
from titanarch.contract.sequence import SequenceInfo
from titanarch.parallel.context_layout import ContextLayout

B, T, C = 2, 24, 3
# On 4 processes head-tail parts have 3 tokens, contiguous ones 6: shifts within a part, of a part, over several, beyond the row.
SHIFTS = (0, 1, 2, 3, 4, 6, 7, 13, 23, 24, 30)


def rows() -> SequenceInfo:
    """Row 0: documents of 1, 10, 13 tokens; row 1: of 17, 2, 5. Some lie over several parts, some inside one."""
    return SequenceInfo.of_lengths(((1, 10, 13), (17, 2, 5)), seed=0)


def draw(seed: int) -> Tensor:
    return torch.randn(B, T, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shifted(x: Tensor, seq: SequenceInfo, weights: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The tokens ``n`` earlier, and the gradient of their weighted sum."""
    x = x.clone().requires_grad_()
    y = seq.previous(x, n)
    (y * weights).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def by_definition(x: Tensor, seq: SequenceInfo, n: int) -> Tensor:
    y = torch.zeros_like(x)
    for b in range(B):
        for t in range(n, T):
            if seq.document_BT[b, t - n] == seq.document_BT[b, t]:
                y[b, t] = x[b, t - n]
    return y


def on_every_process() -> dict[tuple[bool, int], tuple[Tensor, Tensor]]:
    found = {}
    for head_tail in (False, True):
        layout = ContextLayout(dist.group.WORLD, head_tail=head_tail)
        seq = layout.divide(rows())
        for n in SHIFTS:
            pair = []
            for value in shifted(layout.own(draw(0), 1), seq, layout.own(draw(1), 1), n):
                gathered = [torch.empty_like(value) for _ in range(layout.degree)]
                dist.all_gather(gathered, value.contiguous())
                pair.append(layout.in_order(torch.cat(gathered, 1)))
            found[head_tail, n] = pair[0], pair[1]
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_previous_tokens_cross_parts(world_size: int) -> None:
    expected = {n: shifted(draw(0), rows(), draw(1), n) for n in SHIFTS}
    for n, (y, _) in expected.items():
        assert torch.equal(y, by_definition(draw(0), rows(), n)), n
    for found in run_distributed(on_every_process, world_size):
        for (head_tail, n), (y, grad) in found.items():
            assert torch.equal(y, expected[n][0]), (head_tail, n)
            assert torch.equal(grad, expected[n][1]), (head_tail, n)
