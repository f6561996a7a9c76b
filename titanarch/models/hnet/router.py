"""Where chunks begin: neighbouring tokens that a router finds unlike are parted; and the way around the chunks.

Shapes: B rows, T tokens, D model dim.
"""

import torch
from torch import Tensor, nn

from titanarch.contract.init import Init
from titanarch.contract.layers import Linear
from titanarch.contract.roles import Kind, Role
from titanarch.contract.sequence import SequenceInfo

WRAPPER = Role(Kind.HIDDEN, decay=True)
"""Matrices of router and residual start at the identity and at zero, which Muon's orthogonal updates would not keep near."""


class WrapperLinear(Linear):
    """A layer of the router or the residual around an inner stage; its input is taken as fp32 at least, its parameters are."""

    roles: dict[str, Role] = {"weight": WRAPPER}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))


class Router(nn.Module):
    """p_t = (1 - cos(W_q x_{t-1}, W_k x_t)) / 2, and 1 where a document begins (equation 4 of the paper)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.wq = WrapperLinear(d_model, d_model, bias=False)
        self.wk = WrapperLinear(d_model, d_model, bias=False)

    def reset_parameters(self, init: Init) -> None:
        """The identity both, so that p starts as what neighbours' own directions say."""
        for linear in (self.wq, self.wk):
            init.fill(linear, "weight", lambda shape, _: torch.eye(*shape))

    def forward(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        """Probabilities [B, T], fp32 at least."""
        starts_BT = (seq.position_BT == 0) | (seq.index_T == 0)
        return self.between(seq.previous(x_BTD, 1), x_BTD).masked_fill(starts_BT, 1.0)

    def between(self, before_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        """How likely each token begins a chunk after the one before it, [B, T]."""
        cosine_BT = torch.cosine_similarity(self.wq(before_BTD), self.wk(x_BTD), dim=-1)
        return ((1 - cosine_BT) / 2).clamp(0.0, 1.0)


class Residual(nn.Module):
    """What tokens read of the chunks, plus a linear map of the tokens themselves, in fp32 at least."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.linear = WrapperLinear(d_model, d_model, bias=True)

    def reset_parameters(self, init: Init) -> None:
        """Zero, so that it starts with what passed through the stage alone."""
        for name in ("weight", "bias"):
            init.constant(self.linear, name, 0.0)

    def forward(self, read_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        """[B, T, D] of both, fp32 at least."""
        out: Tensor = read_BTD + self.linear(x_BTD)
        return out
