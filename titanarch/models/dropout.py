"""Dropout whose draws do not depend on the layout of the run."""

from torch import Tensor, nn

from titanarch.contract.sequence import SequenceInfo
from titanarch.ops.counter_random import dropout


class Dropout(nn.Module):
    """Zeroes channels with probability ``p`` and scales the rest by 1 / (1 - p), wherever ``seq`` has a seed.

    ``site`` tells this module's draws from all others'.
    """

    def __init__(self, p: float, site: int) -> None:
        super().__init__()
        self.p = p
        self.site = site

    def forward(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        if self.p == 0 or seq.seed is None:
            return x_BTD
        return dropout(x_BTD, self.p, seed=seq.seed, row_B=seq.row_B, index_T=seq.index_T, site=self.site)
