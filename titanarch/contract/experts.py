"""The parts of a mixture of experts that parallelism must be able to reach: the experts' matrices, and counts of tokens.

Shapes: B rows, T tokens, D model dim, E experts, F hidden units an expert, K experts a token, N = B T K.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanarch.contract.init import Init
from titanarch.contract.layers import Reduce, local
from titanarch.contract.roles import Kind, Role
from titanarch.ops.grouped_mm import grouped_mm

MATRICES = Role(Kind.HIDDEN, decay=True)
"""Not for Muon, which takes one matrix at a time."""


class Experts(nn.Module):
    """E gated units, down(silu(gate(x)) * up(x)), each applied to the tokens that chose it; no token is dropped.

    Tokens are sorted by expert, so that the products are grouped ones and shapes do not depend on the choice.

    Tensor parallelism divides the hidden units of every expert, along ``hidden_dims``, and injects ``reduce_output``, which sums the
    partial results.
    """

    hidden_dims: ClassVar[dict[str, int]] = {"gate_EFD": 1, "up_EFD": 1, "down_EDF": 2}
    """The dimension of each parameter that counts hidden units."""
    roles: ClassVar[dict[str, Role]] = dict.fromkeys(hidden_dims, MATRICES)
    reduce_output: Reduce | None = None

    def __init__(self, n_experts: int, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_EFD = nn.Parameter(torch.empty(n_experts, d_ff, d_model))
        self.up_EFD = nn.Parameter(torch.empty(n_experts, d_ff, d_model))
        self.down_EDF = nn.Parameter(torch.empty(n_experts, d_model, d_ff))

    def reset_parameters(self, init: Init, layer: int) -> None:
        """gate and up as linears of the scheme, down as a residual output of block ``layer``."""
        init.matrices(self, "gate_EFD")
        init.matrices(self, "up_EFD")
        init.matrices(self, "down_EDF", residual_of=layer)

    def forward(self, x_BTD: Tensor, chosen_BTK: Tensor, weight_BTK: Tensor) -> Tensor:
        """The weighted sum of what the chosen experts make of each token, [B, T, D]. ``chosen``: numbers of experts."""
        x_MD, chosen_N, n_chosen = x_BTD.flatten(0, 1), chosen_BTK.flatten(), chosen_BTK.shape[-1]
        order_N = torch.argsort(chosen_N, stable=True)
        gate_EFD = local(self.gate_EFD)
        count_E = count_of(chosen_N[None], gate_EFD.shape[0])[0]
        ends_E = count_E.cumsum(0).to(torch.int32)
        sorted_ND = x_MD.index_select(0, order_N // n_chosen)
        hidden_NF = F.silu(grouped_mm(sorted_ND, gate_EFD, ends_E)) * grouped_mm(sorted_ND, local(self.up_EFD), ends_E)
        made_ND = grouped_mm(hidden_NF, local(self.down_EDF), ends_E)
        place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.shape[0], device=order_N.device))
        made_MKD = made_ND.index_select(0, place_N).unflatten(0, (-1, n_chosen))
        out_BTD = torch.einsum("mkd,mk->md", made_MKD, weight_BTK.flatten(0, 1).to(made_MKD.dtype)).view_as(x_BTD)
        return out_BTD if self.reduce_output is None else self.reduce_output(out_BTD)


def count_of(chosen_BN: Tensor, n: int) -> Tensor:
    """How often each number below ``n`` occurs in each row, int64 [B, n]."""
    return torch.zeros(chosen_BN.shape[0], n, dtype=torch.int64, device=chosen_BN.device).scatter_add_(
        1, chosen_BN, torch.ones_like(chosen_BN)
    )


class TokenCounts(nn.Module):
    """Sums what each process counts of its tokens; parallel/ injects the sums where tokens are divided. Without gradients."""

    sum_over_rows: Reduce | None = None
    """Over the processes that hold other parts of the same rows."""
    sum_over_batch: Reduce | None = None
    """Over all processes that hold other tokens."""

    def over_rows(self, count: Tensor) -> Tensor:
        return count if self.sum_over_rows is None else self.sum_over_rows(count)

    def over_batch(self, count: Tensor) -> Tensor:
        return count if self.sum_over_batch is None else self.sum_over_batch(count)
