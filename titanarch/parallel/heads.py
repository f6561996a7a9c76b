"""Dividing the heads of a mix step: what tensor parallelism and the HEADS form of context parallelism share.

Query head j of H reads head j * n // H of a stream with n heads.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from titanarch.contract.split import Split


def split_head_params(params: Mapping[str, Tensor], declared: Mapping[str, Split], *, rank: int, degree: int) -> dict[str, Tensor]:
    """The local heads of PER_HEAD entries (dimension 0); SHARED ones as they are."""
    local = {}
    for name, value in params.items():
        split = declared.get(name)
        if split is None:
            raise KeyError(f"head_params holds '{name}', which tensor_parallel does not declare; add it as PER_HEAD or SHARED")
        local[name] = value.tensor_split(degree, dim=0)[rank] if split.kind == "per_head" else value
    return local


def heads_read_by(first_query: int, n_queries: int, *, n_query_heads: int, n_heads: int) -> list[int]:
    """The stream heads that the query heads ``first_query`` and on read, without repeats where all read evenly.

    The result keeps the rule query j -> head j * n // H within the selection, so it may repeat a head.
    """
    read = [(first_query + j) * n_heads // n_query_heads for j in range(n_queries)]
    distinct = sorted(set(read))
    evenly = [distinct[j * len(distinct) // n_queries] for j in range(n_queries)]
    return distinct if evenly == read else read


def select_heads(x: Tensor, heads: list[int]) -> Tensor:
    """Heads (dimension 2) of a stream that is whole here."""
    if heads == list(range(x.shape[2])):
        return x
    if heads == list(range(heads[0], heads[-1] + 1)):
        return x[:, :, heads[0] : heads[-1] + 1]
    return x.index_select(2, torch.tensor(heads, device=x.device))
