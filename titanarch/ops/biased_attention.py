"""Attention with a bias by distance: ALiBi, T5 buckets, continuous position bias, or none.

    s_ij = cap(scale q_i . k_j) + table[h, i - j],        cap(x) = soft_cap tanh(x / soft_cap), or x
    y_i  = sum_j drop(exp(s_ij - lse_i)) v_j,             lse_i = log(sum_j exp(s_ij) + exp(sink_h))

over the keys j that are visible: in the query's document, not after it (causal), inside the window. The soft cap comes
before the bias and the masks (Gemma 2, arXiv:2408.00118), the sink is one more logit in the denominator (gpt-oss,
arXiv:2508.10925), dropout falls on normalized probabilities. A query that sees nothing gives y = 0 and lse = -inf, the
sink if there is one. Softmax is in float32 (float64 for float64 inputs).

Distances are differences of ``index_T``, the index in the row; inside a document that is the distance in the document.

Which kernel runs is decided by arguments, dtypes and device alone, never by data:
1. nothing but causality on aligned sides, or nothing at all: ``F.scaled_dot_product_attention``, on CUDA cuDNN before flash;
2. on CUDA, without dropout, float32 or less, head dims of 16 or more: FlexAttention (:mod:`titanarch.ops._attention_flex`);
3. up to 2**14 logits: :func:`reference_attention`;
4. on the CPU, equal aligned sides and head dims, a table without gradient or none, no more than documents, window and
   causality beside it, and a mask of up to 2**22 entries: SDPA's flash with that mask;
5. a soft cap, dropout, different head dims, not on a CPU; the backward of a learned table or of lse: blocks of queries in
   plain torch (:mod:`titanarch.ops._attention_chunked`), exact gradients, the table's by shearing;
6. the rest: the CPU's flash kernel on blocks of queries (:mod:`titanarch.ops._attention_flash`).
5 and 6 hold no [T, S] tensor. :func:`reference_attention` is the definition, and the way to second derivatives.

Shapes: B rows, T queries, S keys, H query heads, G key heads (query head j uses key head j G // H), K key dim, V value dim,
N distances of a table.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from titanarch.ops import _attention_flex
from titanarch.ops._attention_operator import biased_attention_operator
from titanarch.ops._attention_tokens import (
    NEVER,
    AttentionDropout,
    AttentionTokens,
    aligned_bias,
    gathered_bias,
    known_offset,
    readable,
    table_reach,
    whole_mask,
)
from titanarch.ops.counter_random import column_words, extend_keys, keep_from_bits, random_bits, row_keys, token_keys
from titanarch.ops.rocm import attention_backends

__all__ = ["AttentionDropout", "AttentionTokens", "apply_sinks", "biased_attention", "reference_attention"]

_SMALL_LOGITS = 1 << 14
_WHOLE_MASK = 1 << 22
"""Entries of a mask that may be written out and kept for the backward: 16 MiB in float32."""

_BACKENDS = attention_backends()


def biased_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    query: AttentionTokens,
    key: AttentionTokens,
    scale: float,
    table_HN: Tensor | None = None,
    causal: bool = True,
    packed: bool = True,
    contiguous: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
    dropout: AttentionDropout | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y [B, T, H, V] in q's dtype, and lse [B, T, H] in float32 (float64) if asked for, both differentiable.

    ``table_HN``: bias of distance n = query index - key index; causal: column n of N; else column n + N - 1 of 2 N - 1.
    A longer distance in a row raises ValueError (not-a-number on CUDA where the host does not know the indices).
    ``packed=False`` promises that every row is one document. ``contiguous`` promises that both ``index_T`` count up by one;
    the offset between the sides is known when they share one ``index_T``, both have ``start``, or eagerly on the CPU;
    otherwise distances are looked up pair by pair, which is slower.
    ``window``: keys with query index - key index < window (either way round if not causal), in tokens.
    """
    _check(q_BTHK, k_BSGK, v_BSGV, table_HN=table_HN, sinks_H=sinks_H, window=window, soft_cap=soft_cap)
    if dropout is not None and dropout.p == 0.0:
        dropout = None
    offset = known_offset(query, key, contiguous)
    bare = table_HN is None and window is None and soft_cap is None and sinks_H is None and dropout is None
    n_rows, n_queries, n_heads = q_BTHK.shape[:3]
    n_keys = k_BSGK.shape[1]
    if bare and not packed and not return_lse and (not causal or (offset == 0 and n_queries == n_keys)):
        return _plain(q_BTHK, k_BSGK, v_BSGV, scale, causal=causal), None
    if _attention_flex.fits(q_BTHK, v_BSGV, dropout):
        y_BTHV, lse_BTH = _attention_flex.flex(
            q_BTHK, k_BSGK, v_BSGV, query=query, key=key, scale=scale, table_HN=table_HN, causal=causal, packed=packed,
            window=window, soft_cap=soft_cap, return_lse=return_lse or sinks_H is not None,
        )  # fmt: skip
        if sinks_H is not None and lse_BTH is not None:
            y_BTHV, lse_BTH = apply_sinks(y_BTHV, lse_BTH, sinks_H)
        return y_BTHV, lse_BTH if return_lse else None
    if n_rows * n_heads * n_queries * n_keys <= _SMALL_LOGITS:
        return reference_attention(
            q_BTHK, k_BSGK, v_BSGV, query=query, key=key, scale=scale, table_HN=table_HN, causal=causal, packed=packed,
            contiguous=contiguous, window=window, soft_cap=soft_cap, sinks_H=sinks_H, dropout=dropout, return_lse=return_lse,
        )  # fmt: skip
    like = q_BTHK.new_empty(0, dtype=_softmax_dtype(q_BTHK))
    if offset is None:
        bias = gathered_bias(table_HN, query=query, key=key, window=window, causal=causal, like=like)
    else:
        bias = aligned_bias(table_HN, offset=offset, n_queries=n_queries, n_keys=n_keys, window=window, causal=causal, like=like)
    additive = not (bias.value_HM.requires_grad or soft_cap or dropout is not None or sinks_H is not None or return_lse)
    if additive and offset == 0 and n_queries == n_keys and q_BTHK.device.type == "cpu" and q_BTHK.shape[3] == v_BSGV.shape[3]:
        document_BT = query.document_BT if packed else None
        if bias.value_HM.shape[0] * n_queries * n_keys * (n_rows if packed else 1) <= _WHOLE_MASK:
            return _plain(q_BTHK, k_BSGK, v_BSGV, scale, mask=whole_mask(bias, document_BT)), None
    y_BTHV, lse_BTH = biased_attention_operator(
        q_BTHK, k_BSGK, v_BSGV, bias.value_HM, bias.first, bias.visible_from, bias.visible_to, bias.aligned,
        query.index_T, key.index_T, query.document_BT if packed else None, key.document_BT if packed else None,
        sinks_H, None if dropout is None else row_keys(dropout.seed, dropout.row_B, dropout.site),
        0.0 if dropout is None else dropout.p, 0 if dropout is None else dropout.first_head, scale, soft_cap or 0.0,
    )  # fmt: skip
    return y_BTHV, lse_BTH if return_lse else None


def reference_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    query: AttentionTokens,
    key: AttentionTokens,
    scale: float,
    table_HN: Tensor | None = None,
    causal: bool = True,
    packed: bool = True,
    contiguous: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
    dropout: AttentionDropout | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The definition of :func:`biased_attention`, same arguments, with every [B, H, T, S] tensor in memory.

    Ordinary differentiable torch, so it has derivatives of every order. ``contiguous`` makes no difference here.
    """
    _check(q_BTHK, k_BSGK, v_BSGV, table_HN=table_HN, sinks_H=sinks_H, window=window, soft_cap=soft_cap)
    dtype = _softmax_dtype(q_BTHK)
    k_BSHK, v_BSHV = (_per_query_head(x_BSGX, q_BTHK.shape[2]).to(dtype) for x_BSGX in (k_BSGK, v_BSGV))
    score_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK.to(dtype), k_BSHK) * scale
    if soft_cap is not None:
        score_BHTS = soft_cap * torch.tanh(score_BHTS / soft_cap)
    distance_TS = query.index_T[:, None] - key.index_T[None, :]
    visible_BTS = (distance_TS >= 0 if causal else torch.ones_like(distance_TS, dtype=torch.bool))[None]
    if window is not None:
        visible_BTS = visible_BTS & (distance_TS.abs() < window)
    if table_HN is not None:
        score_BHTS = score_BHTS + _table_by_pair(table_HN, distance_TS, visible_BTS, causal).to(dtype)
    if packed:
        visible_BTS = visible_BTS & (query.document_BT[:, :, None] == key.document_BT[:, None, :])
    score_BHTS = score_BHTS.masked_fill(~visible_BTS[:, None], NEVER)
    blind_BHT1 = ~visible_BTS.any(-1)[:, None, :, None]
    lse_BHT1 = torch.logsumexp(score_BHTS, -1, keepdim=True).masked_fill(blind_BHT1, -math.inf)
    if sinks_H is not None:
        lse_BHT1 = torch.logaddexp(lse_BHT1, sinks_H.to(dtype)[:, None, None])
    p_BHTS = torch.exp(score_BHTS - lse_BHT1.masked_fill(lse_BHT1 == -math.inf, 0.0))
    if dropout is not None:
        p_BHTS = p_BHTS * _keep(dropout, query, key, q_BTHK.shape[2]) / (1.0 - dropout.p)
    y_BTHV = torch.einsum("bhts,bshv->bthv", p_BHTS, v_BSHV)
    return y_BTHV.to(q_BTHK.dtype), lse_BHT1.squeeze(-1).transpose(1, 2) if return_lse else None


def apply_sinks(y_BTHV: Tensor, lse_BTH: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Attention without sinks and its lse -> y and lse with them: the sink takes its share of every query. Differentiable.

    Ring attention merges its parts without sinks and ends with this.
    """
    sinks_H = sinks_H.to(lse_BTH.dtype)
    total_BTH = torch.logaddexp(lse_BTH, sinks_H)
    return (y_BTHV * torch.sigmoid(lse_BTH - sinks_H)[..., None]).to(y_BTHV.dtype), total_BTH


def _softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_query_head(x_BSGX: Tensor, n_heads: int) -> Tensor:
    n_key_heads = x_BSGX.shape[2]
    if n_key_heads == n_heads:
        return x_BSGX
    return x_BSGX.index_select(2, torch.arange(n_heads, device=x_BSGX.device) * n_key_heads // n_heads)


def _plain(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    n_heads, grouped = q_BTHK.shape[2], k_BSGK.shape[2] != q_BTHK.shape[2]
    if grouped and n_heads % k_BSGK.shape[2]:
        k_BSGK, v_BSGV, grouped = _per_query_head(k_BSGK, n_heads), _per_query_head(v_BSGV, n_heads), False
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))
    with sdpa_kernel(_BACKENDS, set_priority=True) if q.is_cuda else contextlib.nullcontext():
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def _table_by_pair(table_HN: Tensor, distance_TS: Tensor, visible_1TS: Tensor, causal: bool) -> Tensor:
    """Bias [H, T, S]. Raises ValueError on the CPU where a visible distance is beyond the table; elsewhere not-a-number."""
    reach = table_reach(table_HN, causal)
    beyond_TS = visible_1TS[0] & (distance_TS.abs() >= reach)
    if readable(distance_TS) and bool(beyond_TS.any()):
        longest = int(distance_TS.abs()[beyond_TS].max())
        raise ValueError(f"a bias table of {reach} distances does not reach {longest} tokens; build it for the longest distance")
    column_TS = distance_TS.clamp(0 if causal else 1 - reach, reach - 1) + (0 if causal else reach - 1)
    return table_HN[:, column_TS].masked_fill(beyond_TS, math.nan)


def _keep(dropout: AttentionDropout, query: AttentionTokens, key: AttentionTokens, n_heads: int) -> Tensor:
    """Which probabilities dropout keeps, bool [B, H, T, S]."""
    key_BT = token_keys(dropout.seed, dropout.row_B, query.index_T, dropout.site)
    head_H = torch.arange(dropout.first_head, dropout.first_head + n_heads, device=key_BT.device)
    key_BHT = extend_keys(key_BT[:, None], head_H[:, None])
    return keep_from_bits(random_bits(key_BHT, column_words(key.index_T)), dropout.p)


def _check(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    table_HN: Tensor | None,
    sinks_H: Tensor | None,
    window: int | None,
    soft_cap: float | None,
) -> None:
    n_heads = q_BTHK.shape[2]
    if k_BSGK.shape[:3] != v_BSGV.shape[:3] or q_BTHK.shape[0] != k_BSGK.shape[0] or q_BTHK.shape[3] != k_BSGK.shape[3]:
        raise ValueError(
            f"q {tuple(q_BTHK.shape)}, k {tuple(k_BSGK.shape)}, v {tuple(v_BSGV.shape)} are not [B,T,H,K], [B,S,G,K], [B,S,G,V]"
        )
    if k_BSGK.shape[2] > n_heads:
        raise ValueError(f"{k_BSGK.shape[2]} key heads for {n_heads} query heads: at most one each")
    for name, per_head in (("table", table_HN), ("sinks", sinks_H)):
        if per_head is not None and per_head.shape[0] != n_heads:
            raise ValueError(f"{name}: dim 0 must be the {n_heads} query heads, got shape {tuple(per_head.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    if soft_cap is not None and soft_cap <= 0.0:
        raise ValueError(f"soft_cap must be positive, or None for no cap; got {soft_cap}")
