"""A module that knows nothing of titanarch, as a user's own would be.

Shapes: B rows, T tokens, D width.
"""

import torch
from torch import Tensor, nn


class RunningMean(nn.Module):
    """The mean of a projection of all tokens so far, projected back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(width, width)
        self.write = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        n_T1 = torch.arange(1, x_BTD.shape[1] + 1, device=x_BTD.device)[:, None]
        return self.write(self.read(x_BTD).cumsum(1) / n_T1)
