"""Exact attention with a bias by distance in O(T) memory: forward and backward over blocks of queries, in plain torch.

Of a block of R queries and s keys only the [R, s] logits exist, in scratch memory that all blocks share. With

    s_ij = cap(scale q_i . k_j) + bias[h, i - j],  P_ij = exp(s_ij - lse_i),  y_i = sum_j P_ij v_j

the backward computes P again and, with dP_ij = dy_i . v_j and delta_i = dy_i . y_i, gives ``dS = P (dP - delta + dlse)``,
from which ``dq = scale dS k``, ``dk = scale dS^T q``, ``dv = P^T dy`` (Dao et al., arXiv:2205.14135), and the gradient of
the bias by distance, ``d bias[h, n] = sum over i - j = n of dS_ij``.

Queries are taken in reversed order: then a block's bias is a window on one vector (entry r + s for reversed query r and key
s: a strided view, nothing is copied), and its gradient is the column sums of dS sheared the same way.

Shapes: B rows, T queries, S keys, H query heads, K key dim, V value dim; of a block b rows, h heads, R queries, s keys;
n = b h.
"""

import math
from collections.abc import Iterator
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

    hidden_b1Rs: Tensor | None
    entry_Rs: Tensor | None
    key_bR: Tensor | None
    word_s: Tensor | None


@dataclass(frozen=True)
class _Part:
    """Some heads of a block, and what computing them needs."""

    a: Inputs
    block: Block
    heads: slice
    around: _Surroundings
    scratch: Scratch

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[b, h, R, s] of its logits."""
        block = self.block
        return block.b1 - block.b0, self.heads.stop - self.heads.start, block.n_queries, block.n_keys

    @property
    def bias_heads(self) -> slice:
        """Its heads of the bias by distance, which may have one for all."""
        return self.heads if self.a.bias_HM.shape[0] > 1 else slice(0, 1)

    @property
    def entries(self) -> slice:
        """Its entries of an aligned bias."""
        start = self.block.r0 + self.block.s0
        return slice(start, start + self.block.n_queries + self.block.n_keys - 1)


def _block_size(a: Inputs) -> tuple[int, int, int]:
    """Queries, rows and heads of a block: few queries skip more of the future, many multiply faster."""
    n_keys = a.k_BSGK.shape[1]
    n_queries = min(a.q_BTHK.shape[1], max(32, min(_BLOCK_LOGITS // n_keys, max(64, n_keys // 8), 256)))
    n_heads = max(1, min(a.n_heads, _BLOCK_LOGITS // (n_queries * n_keys)))
    return n_queries, max(1, _BLOCK_LOGITS // (n_heads * n_queries * n_keys)), n_heads


def _parts(a: Inputs) -> Iterator[_Part]:
    """All parts with a visible key."""
    n_queries, n_rows, n_heads = _block_size(a)
    scratch = Scratch(a.bias_HM)
    for block in a.blocks(n_queries, n_rows):
        if block.n_keys:
            around = _surroundings(a, block)
            for head in range(0, a.n_heads, n_heads):
                yield _Part(a, block, slice(head, min(head + n_heads, a.n_heads)), around, scratch)


def _surroundings(a: Inputs, block: Block) -> _Surroundings:
    tokens = a.tokens(block)
    hidden = key = word = None
    if a.query_document_BT is not None and a.key_document_BS is not None:
        query_bR = a.query_document_BT[block.rows, tokens].flip(1)
        other_bRs = query_bR[:, :, None] != a.key_document_BS[block.rows, None, block.keys]
        hidden = other_bRs[:, None].to(a.dtype).mul_(NEVER)
    if a.dropout_key_B is not None:
        key = extend_keys(a.dropout_key_B[block.rows, None], a.query_index_T[tokens].flip(0))
        word = column_words(a.key_index_S[block.keys])
    return _Surroundings(hidden, None if a.aligned else a.entries(block), key, word)


def _keep_scaled(part: _Part) -> Tensor | None:
    """Dropout's factors, 0 or 1 / (1 - p), [n, R, s]."""
    key_bR, word_s, p = part.around.key_bR, part.around.word_s, part.a.dropout_p
    if key_bR is None or word_s is None:
        return None
    head_h = torch.arange(part.heads.start, part.heads.stop, device=key_bR.device) + part.a.first_head
    key_nR = extend_keys(key_bR[:, None], head_h[:, None]).flatten(0, 1)
    return keep_from_bits(random_bits(key_nR, word_s), p).to(part.a.dtype).mul_(1.0 / (1.0 - p))


def _probabilities(part: _Part, q_nRK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Softmax [n, R, s] without the sink, the logits, and the soft cap's tanh; all in scratch memory."""
    a, hidden_b1Rs = part.a, part.around.hidden_b1Rs
    score_bhRs = part.scratch("score", *part.shape)
    score_nRs = score_bhRs.flatten(0, 1)
    k_nKs = a.keys(a.k_BSGK, part.block, part.heads).transpose(1, 2)
    if part.around.entry_Rs is None:
        bias_hRs = a.bias_HM[part.bias_heads, part.entries].unfold(1, part.block.n_keys, 1)
    else:
        bias_hRs = a.bias_HM[part.bias_heads][:, part.around.entry_Rs]
    tanh_nRs = None
    if a.soft_cap:
        tanh_nRs = torch.bmm(q_nRK, k_nKs, out=part.scratch("tanh", *score_nRs.shape)).mul_(a.scale / a.soft_cap).tanh_()
        torch.add(bias_hRs, tanh_nRs.view(part.shape), alpha=a.soft_cap, out=score_bhRs)
        if hidden_b1Rs is not None:
            score_bhRs.add_(hidden_b1Rs)
    else:
        if hidden_b1Rs is None:
            score_bhRs.copy_(bias_hRs)
        else:
            # A bias shared by all heads is one head here, and an output smaller than its tensor would be resized.
            torch.add(hidden_b1Rs, bias_hRs.expand(part.shape), out=score_bhRs)
        score_nRs.baddbmm_(q_nRK, k_nKs, alpha=a.scale)
    return torch.softmax(score_nRs, -1, out=part.scratch("p", *score_nRs.shape)), score_nRs, tanh_nRs


def forward(a: Inputs) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] in q's dtype; lse [B, T, H], the sink included, -inf where a query sees nothing."""
    y_BTHV = a.q_BTHK.new_zeros(*a.q_BTHK.shape[:3], a.v_BSGV.shape[3])
    lse_BTH = a.bias_HM.new_full(a.q_BTHK.shape[:3], -math.inf)
    for part in _parts(a):
        p_nRs, score_nRs, _ = _probabilities(part, a.queries(a.q_BTHK, part.block, part.heads))
        top_nR = score_nRs.amax(-1)
        # The largest probability is exp(top - lse), at least 1 / s: two maxima are cheaper than another sum of exponentials.
        lse_nR = (top_nR - p_nRs.amax(-1).log_()).masked_fill_(top_nR < NEVER / 2, -math.inf)
        keep_nRs = _keep_scaled(part)
        dropped_nRs = p_nRs if keep_nRs is None else p_nRs.mul_(keep_nRs)
        y_nRV = torch.bmm(dropped_nRs, a.keys(a.v_BSGV, part.block, part.heads))
        _put_queries(part, y_BTHV, y_nRV)
        _put_queries(part, lse_BTH[..., None], lse_nR[..., None])
    return with_sinks(y_BTHV, lse_BTH, a.sinks_H)


def _put_queries(part: _Part, whole_BTHX: Tensor, part_nRX: Tensor) -> None:
    part_bRhX = part_nRX.unflatten(0, part.shape[:2]).flip(2).transpose(1, 2)
    whole_BTHX[part.block.rows, part.a.tokens(part.block), part.heads] = part_bRhX.to(whole_BTHX.dtype)


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
    for part in _parts(a):
        share_nR1, delta_nR1 = (a.queries(x[..., None], part.block, part.heads) for x in (share_BTH, delta_BTH))
        dy_nRV = a.queries(dy_BTHV, part.block, part.heads).mul_(share_nR1)
        _backward_part(part, grads, dy_nRV, delta_nR1, need_bias)
    return grads


def _backward_part(part: _Part, grads: Gradients, dy_nRV: Tensor, delta_nR1: Tensor, need_bias: bool) -> None:
    a, block, heads = part.a, part.block, part.heads
    q_nRK = a.queries(a.q_BTHK, block, heads)
    p_nRs, _, tanh_nRs = _probabilities(part, q_nRK)
    keep_nRs = _keep_scaled(part)
    dropped_nRs = p_nRs if keep_nRs is None else p_nRs * keep_nRs
    a.add_keys(grads.v, torch.bmm(dropped_nRs.transpose(1, 2), dy_nRV), block, heads)
    v_nVs = a.keys(a.v_BSGV, block, heads).transpose(1, 2)
    dp_nRs = torch.bmm(dy_nRV, v_nVs, out=part.scratch("score", *p_nRs.shape))
    if keep_nRs is not None:
        dp_nRs.mul_(keep_nRs)
    ds_nRs = _score_gradient(part, p_nRs, dp_nRs.sub_(delta_nR1), grads if need_bias else None)
    if tanh_nRs is not None:
        ds_nRs.mul_(tanh_nRs.square_().neg_().add_(1.0))
    _put_queries(part, grads.q, torch.bmm(ds_nRs, a.keys(a.k_BSGK, block, heads)).mul_(a.scale))
    a.add_keys(grads.k, torch.bmm(ds_nRs.transpose(1, 2), q_nRK.mul_(a.scale)), block, heads)


def _score_gradient(part: _Part, p_nRs: Tensor, dp_nRs: Tensor, grads: Gradients | None) -> Tensor:
    """dS = p dp [n, R, s], and its sums by distance added to ``grads.bias``. Where the bias has one head, heads add up."""
    if grads is None:
        return dp_nRs.mul_(p_nRs)
    bias_hM, dims = grads.bias[part.bias_heads], (0, 2) if part.a.bias_HM.shape[0] > 1 else (0, 1, 2)
    n_queries, n_keys = part.shape[2:]
    if part.around.entry_Rs is not None:
        ds_nRs = dp_nRs.mul_(p_nRs)
        sums = ds_nRs.view(part.shape).sum(dims[:-1]).view(bias_hM.shape[0], -1)
        bias_hM.index_add_(1, part.around.entry_Rs.flatten(), sums)
        return ds_nRs
    # A zero margin of R - 1 columns, then a view whose rows are one element shorter: its column m holds all r + s = m.
    width = n_queries + n_keys - 1
    padded_nRW = part.scratch("padded", *p_nRs.shape[:2], width)
    padded_nRW[..., n_keys:] = 0.0
    ds_nRs = torch.mul(p_nRs, dp_nRs, out=padded_nRW[..., :n_keys])
    size = n_queries * width
    sheared_bhRW = padded_nRW.as_strided((*part.shape[:3], width), (part.shape[1] * size, size, width - 1, 1))
    bias_hM[:, part.entries] += sheared_bhRW.sum(dims)
    return ds_nRs
