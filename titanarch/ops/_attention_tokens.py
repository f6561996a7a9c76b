"""What attention must know of its tokens, and the bias by distance that its kernels share.

Shapes: B rows, T queries, S keys, H heads, N distances of a table, M entries of a bias by distance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = -1e30
"""The logit of an invisible key: finite, so that sums with it stay numbers, and its exponential is exactly 0."""


@dataclass(frozen=True)
class AttentionTokens:
    """One side's tokens (queries or keys).

    ``index_T``: [T] int64, index of each token in its row, counted over the whole row also where context parallelism holds
    a part of it. ``document_BT``: [B, T] integers, number of the token's document inside its row. ``start``: where the host
    knows that ``index_T`` is ``start + arange(T)``, that start, in tokens.
    """

    index_T: Tensor
    document_BT: Tensor
    start: int | None = None


@dataclass(frozen=True)
class AttentionDropout:
    """Dropout of attention probabilities, drawn by (seed, site, global row, query index, key index, global head).

    ``p`` probability; ``row_B`` [B] int64 global rows; ``first_head``: global number of the first local query head.
    """

    p: float
    seed: int
    row_B: Tensor
    site: int
    first_head: int = 0


@dataclass(frozen=True)
class DistanceBias:
    """The additive logit of a (query, key) pair as a function of its distance alone: entry ``first - distance``.

    ``value_HM``: [H or 1, M], ``NEVER`` where the pair is invisible; entries [visible_from, visible_to) may be visible.
    ``aligned``: query t of T and key s have entry ``(T - 1 - t) + s``, so no index is looked up and invisible blocks are
    skipped. Otherwise the entry is ``clamp(first - (query index - key index), 0, M - 1)``.
    """

    value_HM: Tensor
    first: int
    visible_from: int
    visible_to: int
    aligned: bool


def readable(x: Tensor) -> bool:
    """Whether reading a value costs nothing: an ordinary tensor on the CPU, outside of tracing."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def known_offset(query: AttentionTokens, key: AttentionTokens, contiguous: bool) -> int | None:
    """First query index minus first key index where the host may know it, else None.

    Known: both sides share one ``index_T``; both have ``start``; or eager on the CPU, where reading it costs nothing.
    """
    if not contiguous:
        return None
    if query.index_T is key.index_T:
        return 0
    if query.start is not None and key.start is not None:
        return query.start - key.start
    if readable(query.index_T) and readable(key.index_T):
        return int(query.index_T[0]) - int(key.index_T[0])
    return None


def table_reach(table_HN: Tensor, causal: bool) -> int:
    """How many distances a table has on a side, 0 included: N, or (N + 1) / 2 of a bidirectional one."""
    n_entries = table_HN.shape[1]
    if not causal and n_entries % 2 == 0:
        raise ValueError(f"a bidirectional table has 2 N - 1 entries, an odd number; got {n_entries}")
    return n_entries if causal else (n_entries + 1) // 2


def _pieces(table_HN: Tensor | None, low: int, high: int, causal: bool, like: Tensor) -> Tensor:
    """Bias [H or 1, high - low + 1] of the distances high, high - 1, .., low."""
    if table_HN is None:
        return like.new_zeros(1, high - low + 1)
    zero = 0 if causal else table_reach(table_HN, causal) - 1
    return table_HN.to(like.dtype)[:, zero + low : zero + high + 1].flip(1)


def aligned_bias(
    table_HN: Tensor | None, *, offset: int, n_queries: int, n_keys: int, window: int | None, causal: bool, like: Tensor
) -> DistanceBias:
    """Bias of consecutive queries and keys, ``offset`` apart. ``like`` gives dtype and device. Differentiable in the table.

    Raises ValueError where a visible distance lies beyond the table.
    """
    first, last = offset + n_queries - 1, offset - (n_keys - 1)
    high = first if window is None else min(first, window - 1)
    low = max(last, 0) if causal else last if window is None else max(last, 1 - window)
    n_entries = first - last + 1
    if high < low:
        return DistanceBias(like.new_full((1, n_entries), NEVER), first, 0, 0, True)
    if table_HN is not None and max(high, -low) >= table_reach(table_HN, causal):
        raise ValueError(
            f"a bias table of {table_reach(table_HN, causal)} distances does not reach {max(high, -low)} tokens; "
            "build it for the longest distance"
        )
    middle = _pieces(table_HN, low, high, causal, like)
    rows = middle.shape[0]
    parts = (like.new_full((rows, first - high), NEVER), middle, like.new_full((rows, low - last), NEVER))
    value = torch.cat([part for part in parts if part.shape[1]], dim=1)
    return DistanceBias(value, first, first - high, first - low + 1, True)


def gathered_bias(
    table_HN: Tensor | None, *, query: AttentionTokens, key: AttentionTokens, window: int | None, causal: bool, like: Tensor
) -> DistanceBias:
    """Bias of arbitrary indices: the visible distances, and one entry a side for all that lie beyond.

    Index distances that neither the table nor the window covers raise ValueError on the CPU; elsewhere, where the host does
    not know the indices, they make the output not-a-number.
    """
    reach = None if table_HN is None else table_reach(table_HN, causal)
    beyond = 0.0 if reach is None and window is None else NEVER
    if reach is not None and (window is None or window > reach):
        beyond = float("nan")
        if readable(query.index_T) and readable(key.index_T):
            _check_reach(query.index_T, key.index_T, reach, causal)
    known = [n for n in (reach, window) if n is not None]
    side = min(known) - 1 if known else 0
    middle = _pieces(table_HN, 0 if causal else -side, side, causal, like)
    past = like.new_full((middle.shape[0], 1), beyond)
    future = torch.full_like(past, NEVER) if causal else past
    value = torch.cat([past, middle, future], dim=1)
    return DistanceBias(value, side + 1, 0, value.shape[1], False)


def _check_reach(query_T: Tensor, key_S: Tensor, reach: int, causal: bool) -> None:
    longest = int(query_T.max() - key_S.min())
    if not causal:
        longest = max(longest, int(key_S.max() - query_T.min()))
    if longest >= reach:
        raise ValueError(f"a bias table of {reach} distances does not reach {longest} tokens; build it for the longest distance")


def whole_mask(bias: DistanceBias, document_BT: Tensor | None) -> Tensor:
    """The additive mask [B or 1, H or 1, T, T] of an aligned bias between T tokens and themselves."""
    n_tokens = (bias.value_HM.shape[1] + 1) // 2
    mask_1HTT = bias.value_HM.unfold(1, n_tokens, 1).flip(1).contiguous()[None]
    if document_BT is None:
        return mask_1HTT
    other_BTT = document_BT[:, :, None] != document_BT[:, None, :]
    return mask_1HTT + other_BTT[:, None].to(mask_1HTT.dtype).mul_(NEVER)
