"""The ratio loss, which keeps chunks at a target length, and what is logged of routers.

With F the share of tokens that begin a chunk and G the mean probability, over all tokens of a micro-batch on all processes,

    L = N / (N - 1) ((N - 1) F G + (1 - F) (1 - G))            (equation 10 of the paper).

F has no gradient, and L is linear in G: with F known everywhere, L is a mean over tokens of terms in their own p. So only
counts are reduced over processes, and each process's share of L and of its gradient is a sum over its own tokens.

Shapes: B rows, T tokens, G stages, K sums.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from titanarch.contract.side_channels import Aux
from titanarch.models.hnet.chunks import Chunks


def routing_sums(p_BT: Tensor, chunks: Chunks, real_BT: Tensor | None) -> Tensor:
    """[4]: sum of p, chunks, tokens, dropped boundaries; of the tokens that do not only fill slots."""
    real = torch.ones_like(p_BT) if real_BT is None else real_BT.to(p_BT.dtype)
    counts = (chunks.begins_BT.sum(), real.sum(), chunks.n_dropped_B.sum())
    return torch.stack([(p_BT * real).sum(), *(count.to(p_BT.dtype) for count in counts)])


def ratio_terms(sums_GK: Tensor, ratios: Sequence[float], sum_over_rows: Callable[[Tensor], Tensor], *, weight: float) -> dict[str, Aux]:
    """Of each stage: ``ratio_loss_i``, differentiated; ``compression_i``, tokens a chunk, and ``overflow_i``, dropped boundaries.

    ``sums_GK``: of this process's tokens. ``sum_over_rows``: sums over all processes that have other rows.
    """
    counts_GK = sums_GK.detach()[:, 1:].double()
    one = counts_GK.new_ones(1)
    *total_N, n_processes = sum_over_rows(torch.cat([counts_GK.flatten(), one])).unbind()
    terms: dict[str, Aux] = {}
    for number, ratio in enumerate(ratios):
        begun, tokens, dropped = total_N[3 * number : 3 * number + 3]
        p_sum, here = sums_GK[number, 0], sums_GK[number, 2].detach()
        F = (begun / tokens).to(p_sum.dtype)
        own = ratio / (ratio - 1) * ((ratio - 1) * F * p_sum + (1 - F) * (here - p_sum))
        # The objective takes the mean of every process's total / counted.
        terms[f"ratio_loss_{number}"] = Aux(own * n_processes.to(own.dtype), tokens.to(own.dtype), weight)
        terms[f"compression_{number}"] = Aux(tokens.to(own.dtype), begun.to(own.dtype), 0.0)
        terms[f"overflow_{number}"] = Aux(dropped.to(own.dtype), torch.ones_like(own), 0.0)
    return terms
