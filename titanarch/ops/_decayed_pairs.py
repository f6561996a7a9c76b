"""Products of the tokens of a chunk under a decay, with exponents that are never positive.

Shapes: * leading dims, C tokens of a chunk (a power of two), R kinds of rows, S kinds of columns, K channels, h half a block.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ChunkDecays(NamedTuple):
    """Sums of log decays in a chunk. ``before`` [*, C, K]: of the tokens before each; ``after``: of those after each; ``total``
    [*, 1, K]: of all. K is 1 where a head has one decay."""

    before: Tensor
    after: Tensor
    total: Tensor


def decayed_pairs(rows: Tensor, columns: Tensor, log_decay: Tensor) -> tuple[Tensor, ChunkDecays]:
    """x[i, j] = sum over channels of rows_i exp(log_decay_{j+1} + ... + log_decay_{i-1}) columns_j for j < i, else 0.

    rows: [*, C, R, K]; columns: [*, C, S, K]; log_decay <= 0: [*, C, K], or [*, C, 1] for one decay a head. x: [*, C, R, C, S].
    """
    return _by_head(rows, columns, log_decay) if log_decay.shape[-1] == 1 else _by_channel(rows, columns, log_decay)


def _by_head(rows: Tensor, columns: Tensor, log_decay: Tensor) -> tuple[Tensor, ChunkDecays]:
    """One product, times the decays between its tokens: sums over each span by itself, since a difference of prefix sums cancels."""
    C = log_decay.shape[-2]
    earlier = torch.ones(C, C, dtype=torch.bool, device=rows.device).tril(-1)
    # [i, j]: of the tokens after j up to i. A pair wants those before i, which is the row above.
    span = log_decay.expand(*log_decay.shape[:-1], C).masked_fill(~earlier, 0).cumsum(-2)
    decay = torch.exp(F.pad(span[..., :-1, :], (0, 0, 1, 0))).masked_fill(~earlier, 0)
    before = F.pad(log_decay.cumsum(-2)[..., :-1, :], (0, 0, 1, 0))
    decays = ChunkDecays(before, span[..., -1, :, None], log_decay.sum(-2, keepdim=True))
    x = (rows.flatten(-3, -2) @ columns.flatten(-3, -2).mT).unflatten(-1, (C, -1)).unflatten(-3, (C, -1))
    return x * decay[..., :, None, :, None], decays


def _by_channel(rows: Tensor, columns: Tensor, log_decay: Tensor) -> tuple[Tensor, ChunkDecays]:
    """Blocks of 1, 2, 4 ... C tokens, each made of two: between its halves, decays are counted from the middle in both directions."""
    C = log_decay.shape[-2]
    lead, R, S = rows.shape[:-3], rows.shape[-2], columns.shape[-2]
    total = log_decay.unsqueeze(-2)  # [*, blocks, 1, K]
    before, after = torch.zeros_like(total), torch.zeros_like(total)
    x = rows.new_zeros(*lead, C, 1, R, 1, S)  # [*, blocks, h, R, h, S]
    h = 1
    while h < C:
        later = rows.unflatten(-3, (-1, 2, h)).select(-4, 1)
        earlier = columns.unflatten(-3, (-1, 2, h)).select(-4, 0)
        (before_1, before_2), (after_1, after_2) = _halves(before), _halves(after)
        total_1, total_2 = _halves(total)
        if h > 1:  # else there is no token between
            later, earlier = later * torch.exp(before_2).unsqueeze(-2), earlier * torch.exp(after_1).unsqueeze(-2)
        between = later.flatten(-3, -2) @ earlier.flatten(-3, -2).mT
        between = between.unflatten(-1, (h, S)).unflatten(-3, (h, R))
        x_1, x_2 = x.unflatten(-5, (-1, 2)).unbind(-5)
        x = torch.cat([F.pad(x_1, (0, 0, 0, h)), torch.cat([between, x_2], -2)], -4)
        before = torch.cat([before_1, before_2 + total_1], -2)
        after = torch.cat([after_1 + total_2, after_2], -2)
        total = total_1 + total_2
        h *= 2
    return x.squeeze(-5), ChunkDecays(before.squeeze(-3), after.squeeze(-3), total.squeeze(-3))


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    """Two blocks each of [*, blocks, n, K]."""
    return x.unflatten(-3, (-1, 2)).unbind(-3)
