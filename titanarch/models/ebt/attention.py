"""Attention of two streams: contexts among themselves, and each prediction to its contexts and itself.

A prediction made at token t stands at position t + 1. It reads the contexts up to t of its document, which it must not change,
and itself; no other prediction. So its softmax is one over keys that all predictions share and a few logits of its own:

    lse' = log(exp(lse) + sum_l exp(s_l)),    y' = y exp(lse - lse') + sum_l v_l exp(s_l - lse')

with y and lse of the shared keys, and s_l, v_l logit and value of own key l: the prediction's, and that of the step embedding,
which contexts read too. No mask of 2T x 2T tokens exists. Contexts need one derivative, and have the fast kernels;
predictions are differentiated twice, and have :func:`reference_attention`, which holds [B, H, T, T].

Shapes: B rows, T tokens, H query heads, G key heads, K key dim, V value dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from titanarch.contract.sequence import SequenceInfo
from titanarch.ops.biased_attention import AttentionTokens, biased_attention, reference_attention


class Keys(NamedTuple):
    """Keys [*, *, G, K] and values [*, *, G, V]."""

    k: Tensor
    v: Tensor


class LayerContext(NamedTuple):
    """What predictions read in a layer: the contexts [B, T, G, K], and the step embedding [1, 1, G, K] where there is one."""

    tokens: Keys
    step: Keys | None


def attend_contexts(q_BTHK: Tensor, context: LayerContext, seq: SequenceInfo, scale: float) -> Tensor:
    """Causal attention of the contexts, [B, T, H, V]."""
    tokens = AttentionTokens(seq.index_T, seq.document_BT)
    y, lse = biased_attention(
        q_BTHK,
        *context.tokens,
        query=tokens,
        key=tokens,
        scale=scale,
        packed=seq.packed,
        contiguous=seq.contiguous,
        return_lse=context.step is not None,
    )
    if context.step is None:
        return y
    assert lse is not None, "it was asked for"
    return with_own_keys(q_BTHK, y, lse, [context.step], scale)


def attend_predictions(q_BTHK: Tensor, own: Keys, context: LayerContext, seq: SequenceInfo, scale: float) -> Tensor:
    """Attention of each prediction to contexts up to its own and to itself, [B, T, H, V]; twice differentiable."""
    tokens = AttentionTokens(seq.index_T, seq.document_BT)
    y, lse = reference_attention(
        q_BTHK, *context.tokens, query=tokens, key=tokens, scale=scale, packed=seq.packed, contiguous=seq.contiguous, return_lse=True
    )
    assert lse is not None, "it was asked for"
    return with_own_keys(q_BTHK, y, lse, [own] if context.step is None else [own, context.step], scale)


def with_own_keys(q_BTHK: Tensor, y_BTHV: Tensor, lse_BTH: Tensor, own: list[Keys], scale: float) -> Tensor:
    """``y`` and ``lse`` of shared keys extended by keys of each query's own, see the module; in q's dtype."""
    n_heads, dtype = q_BTHK.shape[2], lse_BTH.dtype
    logits = [(q_BTHK.to(dtype) * per_query_head(keys.k, n_heads).to(dtype)).sum(-1) * scale for keys in own]
    whole_BTH = torch.logsumexp(torch.stack(torch.broadcast_tensors(lse_BTH, *logits)), 0)
    mixed_BTHV = y_BTHV.to(dtype) * (lse_BTH - whole_BTH).exp().unsqueeze(-1)
    for keys, logit_BTH in zip(own, logits, strict=True):
        mixed_BTHV = mixed_BTHV + per_query_head(keys.v, n_heads).to(dtype) * (logit_BTH - whole_BTH).exp().unsqueeze(-1)
    return mixed_BTHV.to(q_BTHK.dtype)


def per_query_head(x: Tensor, n_heads: int) -> Tensor:
    """[*, *, G, K] to [*, *, H, K]: query head j reads head j G // H."""
    return x if x.shape[2] == n_heads else x.repeat_interleave(n_heads // x.shape[2], dim=2)
