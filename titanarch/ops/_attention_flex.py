"""Attention with a bias by distance on CUDA, by FlexAttention (Dong et al., arXiv:2412.05496).

The table is captured by the score function, so it gets its gradient; documents, window and causality are a mask function,
with a block mask made from the smallest and largest index and document of each block: O((T / 128)^2), nothing of [T, S].

Shapes: B rows, T queries, S keys, H query heads, G key heads, K key dim, V value dim, N distances; P, J blocks of queries, keys.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from titanarch.ops._attention_tokens import AttentionDropout, AttentionTokens, table_reach

_BLOCK = 128
_SMALLEST_HEAD_DIM = 16

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def fits(q_BTHK: Tensor, v_BSGV: Tensor, dropout: AttentionDropout | None) -> bool:
    """Whether FlexAttention's CUDA kernels compute this: no dropout, no float64, head dims of 16 or more."""
    small = min(q_BTHK.shape[3], v_BSGV.shape[3]) < _SMALLEST_HEAD_DIM
    return q_BTHK.is_cuda and dropout is None and q_BTHK.dtype != torch.float64 and not small


@functools.cache
def _compiled() -> Callable[..., Any]:
    """Eager FlexAttention would write out all logits, so outside of a compiled region it is compiled alone."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def mask_function(query: AttentionTokens, key: AttentionTokens, *, causal: bool, packed: bool, window: int | None) -> Mask:
    """``visible(row, head, query, key)`` of scalar tensors, as FlexAttention calls it."""
    query_T, key_S = query.index_T, key.index_T
    query_BT, key_BS = query.document_BT, key.document_BT

    def visible(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        distance = query_T[t] - key_S[s]
        seen = distance >= 0 if causal else distance == distance
        if window is not None:
            seen = seen & (distance.abs() < window)
        if packed:
            seen = seen & (query_BT[b, t] == key_BS[b, s])
        return seen

    return visible


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each block of the last dim: [..., T] -> two [..., P]."""
    n_missing = -x.shape[-1] % _BLOCK
    if n_missing:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], n_missing)], dim=-1)
    blocks = x.unflatten(-1, (-1, _BLOCK))
    return blocks.amin(-1), blocks.amax(-1)


def block_mask(query: AttentionTokens, key: AttentionTokens, *, causal: bool, packed: bool, window: int | None, n_rows: int) -> BlockMask:
    """The blocks of 128 x 128 with any visible pair, apart from those where all pairs are. Needs no value on the host."""
    (q_min, q_max), (k_min, k_max) = _extremes(query.index_T), _extremes(key.index_T)
    nearest, farthest = q_min[:, None] - k_max[None, :], q_max[:, None] - k_min[None, :]
    some = torch.ones_like(nearest, dtype=torch.bool)
    every = some
    if causal:
        some, every = farthest >= 0, nearest >= 0
    if window is not None:
        some = some & (nearest < window) & (farthest > -window)
        every = every & (farthest < window) & (nearest > -window)
    some_BPJ, every_BPJ = (x[None].expand(n_rows if packed else 1, *x.shape) for x in (some, every))
    if packed:
        (q_least, q_most), (k_least, k_most) = _extremes(query.document_BT), _extremes(key.document_BT)
        some_BPJ = some_BPJ & (q_most[:, :, None] >= k_least[:, None, :]) & (q_least[:, :, None] <= k_most[:, None, :])
        one = (q_least == q_most)[:, :, None] & (k_least == k_most)[:, None, :]
        every_BPJ = every_BPJ & one & (q_least[:, :, None] == k_least[:, None, :])
    n_blocks, order = _ordered(some_BPJ & ~every_BPJ)
    n_full, full_order = _ordered(every_BPJ)
    return BlockMask.from_kv_blocks(
        n_blocks,
        order,
        n_full,
        full_order,
        BLOCK_SIZE=_BLOCK,
        mask_mod=mask_function(query, key, causal=causal, packed=packed, window=window),
        seq_lengths=(query.index_T.shape[0], key.index_T.shape[0]),
    )


def _ordered(chosen_BPJ: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [B, 1, P] and indices [B, 1, P, J] of the chosen blocks, chosen first, as int32."""
    order = torch.argsort(chosen_BPJ.to(torch.int8), dim=-1, descending=True, stable=True)
    return chosen_BPJ.sum(-1)[:, None].to(torch.int32), order[:, None].to(torch.int32)


def flex(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    query: AttentionTokens,
    key: AttentionTokens,
    scale: float,
    table_HN: Tensor | None,
    causal: bool,
    packed: bool,
    window: int | None,
    soft_cap: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """y [B, T, H, V] and lse [B, T, H] (float32) without sinks; arguments as :func:`biased_attention`."""
    n_heads, n_key_heads = q_BTHK.shape[2], k_BSGK.shape[2]
    if n_heads % n_key_heads:
        heads = torch.arange(n_heads, device=q_BTHK.device) * n_key_heads // n_heads
        k_BSGK, v_BSGV = k_BSGK.index_select(2, heads), v_BSGV.index_select(2, heads)
    query_T, key_S = query.index_T, key.index_T
    reach = 0 if table_HN is None else table_reach(table_HN, causal)
    low, zero = (0, 0) if causal else (1 - reach, reach - 1)

    def score(logit: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if soft_cap is not None:
            logit = soft_cap * torch.tanh(logit / soft_cap)
        if table_HN is None:
            return logit
        distance = query_T[t] - key_S[s]
        inside = distance.clamp(low, reach - 1)
        # Beyond the table a visible key would get a wrong bias: not-a-number is seen at once.
        return logit + torch.where((distance if causal else distance.abs()) < reach, table_HN[h, inside + zero], math.nan)

    alone = q_BTHK.is_cuda and not torch.compiler.is_compiling()
    run = _compiled() if alone else cast(Callable[..., Any], flex_attention)
    y_BHTV, extra = run(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGV.transpose(1, 2),
        score_mod=score,
        block_mask=block_mask(query, key, causal=causal, packed=packed, window=window, n_rows=q_BTHK.shape[0]),
        scale=scale,
        enable_gqa=k_BSGK.shape[2] != n_heads,
        return_aux=AuxRequest(lse=return_lse),
    )
    return y_BHTV.transpose(1, 2), extra.lse.transpose(1, 2) if return_lse else None
