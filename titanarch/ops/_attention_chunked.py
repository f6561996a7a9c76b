"""Exact attention with a bias by distance in O(T) memory: forward and backward over blocks of queries, in plain torch.

Of a block of R queries and s keys only the [R, s] logits exist, in scratch memory that all blocks share. With

    s_ij = cap(scale q_i . k_j) + bias[h, i - j],  P_ij = exp(s_ij - lse_i),  y_i = sum_j P_ij v_j

the backward computes P again and, with dP_ij = dy_i . v_j and delta_i = dy_i . y_i, gives ``dS = P (dP - delta + dlse)``,
from which ``dq = scale dS k``, ``dk = scale dS^T q``, ``dv = P^T dy`` (Dao et al., arXiv:2205.14135), and the gradient of
the bias by distance, ``d bias[h, n] = sum over i - j = n of dS_ij``.

Queries are taken in reversed order: then a block's bias is a window on one vector (entry r + s for reversed query r and key
s: a strided view, nothing is copied), and its gradient is the column sums of dS sheared the same way.

Shapes: B rows, T queries, S keys, H query heads, K key dim, V value dim; of a block b rows, R queries, s keys.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from titanarch.ops._attention_blocks import Block, Gradients, Inputs, Scratch
from titanarch.ops._attention_tokens import NEVER
from titanarch.ops.counter_random import column_words, extend_keys, keep_from_bits, random_bits

_BLOCK_LOGITS = 1 << 20
"""Logits of a block, elements: 4 MiB in float32, so that its passes stay in the cache."""


@dataclass(frozen=True)
class _Surroundings:
    """What the heads of a block share: its document mask, its entries of the bias (unless aligned), its dropout keys."""

    hidden_bRs: Tensor | None
    entry_Rs: Tensor | None
    key_bR: Tensor | None
    word_s: Tensor | None


def _block_size(a: Inputs) -> tuple[int, int]:
    """Queries and rows of a block: small ones skip more of the future, large ones multiply faster."""
    n_keys = a.k_BSGK.shape[1]
    n_queries = min(a.q_BTHK.shape[1], max(32, min(_BLOCK_LOGITS // n_keys, max(64, n_keys // 8), 256)))
    return n_queries, max(1, _BLOCK_LOGITS // (n_queries * n_keys))


def _surroundings(a: Inputs, block: Block) -> _Surroundings:
    tokens = a.tokens(block)
    hidden = key = word = None
    if a.query_document_BT is not None and a.key_document_BS is not None:
        query_bR = a.query_document_BT[block.rows, tokens].flip(1)
        hidden = (query_bR[:, :, None] != a.key_document_BS[block.rows, None, block.keys]).to(a.dtype).mul_(NEVER)
    if a.dropout_key_B is not None:
        key = extend_keys(a.dropout_key_B[block.rows, None], a.query_index_T[tokens].flip(0))
        word = column_words(a.key_index_S[block.keys])
    return _Surroundings(hidden, None if a.aligned else a.entries(block), key, word)


def _keep_scaled(a: Inputs, around: _Surroundings, head: int) -> Tensor | None:
    """Dropout's factors, 0 or 1 / (1 - p), [b, R, s]."""
    if around.key_bR is None or around.word_s is None:
        return None
    key_bR = extend_keys(around.key_bR, torch.full_like(around.key_bR, a.first_head + head))
    return keep_from_bits(random_bits(key_bR, around.word_s), a.dropout_p).to(a.dtype).mul_(1.0 / (1.0 - a.dropout_p))


def _probabilities(
    a: Inputs, block: Block, head: int, q_bRK: Tensor, around: _Surroundings, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Softmax [b, R, s] without the sink, the logits, and the soft cap's tanh; all in scratch memory."""
    shape = (*q_bRK.shape[:2], block.n_keys)
    score = scratch("score", *shape)
    k_bKs = a.keys(a.k_BSGK, block, head).transpose(1, 2)
    bias_M = a.bias_M(head)
    if around.entry_Rs is None:
        start = block.r0 + block.s0
        bias_Rs = bias_M[start : start + block.n_queries + block.n_keys - 1].unfold(0, block.n_keys, 1)
    else:
        bias_Rs = bias_M[around.entry_Rs]
    tanh = None
    if a.soft_cap:
        tanh = torch.bmm(q_bRK, k_bKs, out=scratch("tanh", *shape)).mul_(a.scale / a.soft_cap).tanh_()
        torch.add(bias_Rs, tanh, alpha=a.soft_cap, out=score)
        if around.hidden_bRs is not None:
            score.add_(around.hidden_bRs)
    else:
        if around.hidden_bRs is None:
            score.copy_(bias_Rs)
        else:
            torch.add(around.hidden_bRs, bias_Rs, out=score)
        score.baddbmm_(q_bRK, k_bKs, alpha=a.scale)
    return torch.softmax(score, -1, out=scratch("p", *shape)), score, tanh


def forward(a: Inputs) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] in q's dtype; lse [B, T, H], the sink included, -inf where a query sees nothing."""
    y_BTHV = a.q_BTHK.new_empty(*a.q_BTHK.shape[:3], a.v_BSGV.shape[3])
    lse_BTH = a.bias_HM.new_empty(a.q_BTHK.shape[:3])
    scratch = Scratch(a.bias_HM)
    for block in a.blocks(*_block_size(a)):
        where = (block.rows, a.tokens(block))
        if block.n_keys == 0:
            y_BTHV[where], lse_BTH[where] = 0.0, -math.inf
            continue
        around = _surroundings(a, block)
        for head in range(a.n_heads):
            y_bRV, lse_bR = _forward_head(a, block, head, around, scratch)
            y_BTHV[(*where, head)] = y_bRV.flip(1).to(y_BTHV.dtype)
            lse_BTH[(*where, head)] = lse_bR.flip(1)
    return with_sinks(y_BTHV, lse_BTH, a.sinks_H)


def _forward_head(a: Inputs, block: Block, head: int, around: _Surroundings, scratch: Scratch) -> tuple[Tensor, Tensor]:
    q_bRK = a.queries(a.q_BTHK, block, head)
    p_bRs, score_bRs, _ = _probabilities(a, block, head, q_bRK, around, scratch)
    top_bR = score_bRs.amax(-1)
    # The largest probability is exp(top - lse), at least 1 / s: two maxima are cheaper than another sum of exponentials.
    lse_bR = (top_bR - p_bRs.amax(-1).log_()).masked_fill_(top_bR < NEVER / 2, -math.inf)
    keep = _keep_scaled(a, around, head)
    return torch.bmm(p_bRs if keep is None else p_bRs.mul_(keep), a.keys(a.v_BSGV, block, head)), lse_bR


def with_sinks(y_BTHV: Tensor, lse_BTH: Tensor, sinks_H: Tensor | None) -> tuple[Tensor, Tensor]:
    """In place on y: zero where a query sees nothing, and the sinks' share taken off. Returns lse with the sinks in it."""
    if sinks_H is None:
        return y_BTHV.masked_fill_((lse_BTH == -math.inf)[..., None], 0.0), lse_BTH
    total_BTH = torch.logaddexp(lse_BTH, sinks_H.to(lse_BTH.dtype))
    return y_BTHV.mul_((lse_BTH - total_BTH).exp_()[..., None]), total_BTH


def backward(a: Inputs, y_BTHV: Tensor, lse_BTH: Tensor, dy_BTHV: Tensor, dlse_BTH: Tensor | None, need_bias: bool) -> Gradients:
    """Gradients of everything that has one; the bias' stays zero unless ``need_bias``."""
    grads = Gradients.zeros(a)
    delta_BTH = (dy_BTHV.to(a.dtype) * y_BTHV.to(a.dtype)).sum(-1)
    if dlse_BTH is not None:
        delta_BTH -= dlse_BTH
    # P is a softmax without the sink times the share that the sink leaves; the share scales a query's upstream instead.
    share_BTH = (lse_BTH != -math.inf).to(a.dtype)
    if a.sinks_H is not None:
        over_BTH = a.sinks_H.to(a.dtype) - lse_BTH
        grads.sinks.copy_(-(over_BTH.exp() * delta_BTH).sum((0, 1)))
        share_BTH = over_BTH.expm1_().neg_()
    delta_BTH *= share_BTH
    scratch = Scratch(a.bias_HM)
    for block in a.blocks(*_block_size(a)):
        if block.n_keys == 0:
            continue
        around = _surroundings(a, block)
        for head in range(a.n_heads):
            share_bR1, delta_bR1 = (a.queries(x[..., None], block, head) for x in (share_BTH, delta_BTH))
            dy_bRV = a.queries(dy_BTHV, block, head).mul_(share_bR1)
            _backward_head(a, block, head, around, scratch, grads, dy_bRV, delta_bR1, need_bias)
    return grads


def _backward_head(
    a: Inputs,
    block: Block,
    head: int,
    around: _Surroundings,
    scratch: Scratch,
    grads: Gradients,
    dy_bRV: Tensor,
    delta_bR1: Tensor,
    need_bias: bool,
) -> None:
    q_bRK = a.queries(a.q_BTHK, block, head)
    p_bRs, _, tanh_bRs = _probabilities(a, block, head, q_bRK, around, scratch)
    keep = _keep_scaled(a, around, head)
    where = (block.rows, block.keys, a.key_head(head))
    dropped_bRs = p_bRs if keep is None else p_bRs * keep
    grads.v[where] += torch.bmm(dropped_bRs.transpose(1, 2), dy_bRV)
    dp_bRs = torch.bmm(dy_bRV, a.keys(a.v_BSGV, block, head).transpose(1, 2), out=scratch("score", *p_bRs.shape))
    if keep is not None:
        dp_bRs.mul_(keep)
    ds_bRs = _score_gradient(p_bRs, dp_bRs.sub_(delta_bR1), a, block, head, around, scratch, grads if need_bias else None)
    if tanh_bRs is not None:
        ds_bRs.mul_(tanh_bRs.square_().neg_().add_(1.0))
    dq_bRK = torch.bmm(ds_bRs, a.keys(a.k_BSGK, block, head)).mul_(a.scale)
    grads.q[block.rows, a.tokens(block), head] = dq_bRK.flip(1).to(grads.q.dtype)
    grads.k[where] += torch.bmm(ds_bRs.transpose(1, 2), q_bRK.mul_(a.scale))


def _score_gradient(
    p_bRs: Tensor,
    dp_bRs: Tensor,
    a: Inputs,
    block: Block,
    head: int,
    around: _Surroundings,
    scratch: Scratch,
    grads: Gradients | None,
) -> Tensor:
    """dS = p dp [b, R, s], and its sums by distance added to ``grads.bias``. Where the bias has one head, heads add up."""
    if grads is None:
        return dp_bRs.mul_(p_bRs)
    row_M = grads.bias[head if a.bias_HM.shape[0] > 1 else 0]
    if around.entry_Rs is not None:
        ds_bRs = dp_bRs.mul_(p_bRs)
        row_M.index_add_(0, around.entry_Rs.flatten(), ds_bRs.sum(0).flatten())
        return ds_bRs
    # A zero margin of R - 1 columns, then a view whose rows are one element shorter: its column m holds all r + s = m.
    width = block.n_queries + block.n_keys - 1
    padded_bRW = scratch("padded", *p_bRs.shape[:2], width)
    padded_bRW[..., block.n_keys :] = 0.0
    ds_bRs = torch.mul(p_bRs, dp_bRs, out=padded_bRW[..., : block.n_keys])
    sheared = padded_bRW.as_strided(padded_bRW.shape, (block.n_queries * width, width - 1, 1))
    start = block.r0 + block.s0
    row_M[start : start + width] += sheared.sum((0, 1))
    return ds_bRs
