"""Exact attention with a bias by distance in O(T) memory: forward and backward over blocks of queries.

Of a block of R queries and S keys only the [R, S] logits exist, in scratch memory that all blocks share. With

    s_ij = cap(scale q_i . k_j) + bias[h, i - j],  P_ij = exp(s_ij - lse_i),  y_i = sum_j P_ij v_j

the backward computes P again from lse and, with dP_ij = dy_i . v_j and delta_i = dy_i . y_i, gives
``dS = P (dP - delta + dlse)``, from which ``dq = scale dS k``, ``dk = scale dS^T q``, ``dv = P^T dy`` (Dao et al.,
arXiv:2205.14135) and the bias by distance ``d bias[h, n] = sum over i - j = n of dS_ij``.

Queries are taken in reversed order: then a block's bias is a window on one vector (entry r + s for reversed query r and key
s: a strided view, nothing is copied), and its gradient is the column sums of the same shear of dS.

The two custom operators are opaque to torch.compile, so their loops are not unrolled into a graph.

Shapes: B rows, T queries, S keys, H query heads, G key heads, K key dim, V value dim, M entries of the bias by distance.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from titanarch.ops._attention_tokens import NEVER
from titanarch.ops.counter_random import column_words, extend_keys, keep_from_bits, random_bits

MIN = 32
MAXQ=256
_BLOCK_LOGITS = 1 << 19
"""Logits of a block, elements: 2 MiB in float32, so that a block's passes stay in a core's cache."""


@dataclass(frozen=True)
class Block:
    """Rows [b0, b1), queries [r0, r1) in reversed order, keys [s0, s1)."""

    b0: int
    b1: int
    r0: int
    r1: int
    s0: int
    s1: int


@dataclass(frozen=True)
class Inputs:
    """All that the operators take; the fields of :class:`DistanceBias` are spread out."""

    q_BTHK: Tensor
    k_BSGK: Tensor
    v_BSGV: Tensor
    bias_HM: Tensor
    first: int
    visible_from: int
    visible_to: int
    aligned: bool
    query_index_T: Tensor
    key_index_S: Tensor
    query_document_BT: Tensor | None
    key_document_BS: Tensor | None
    sinks_H: Tensor | None
    dropout_key_B: Tensor | None
    dropout_p: float
    first_head: int
    scale: float
    soft_cap: float

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: the bias' float32 or float64."""
        return self.bias_HM.dtype

    def key_head(self, head: int) -> int:
        return head * self.k_BSGK.shape[2] // self.q_BTHK.shape[2]

    def queries(self, x_BTHX: Tensor, block: Block, head: int) -> Tensor:
        """A block's queries of one head in reversed order, [b, R, X] contiguous."""
        n_queries = x_BTHX.shape[1]
        return x_BTHX[block.b0 : block.b1, n_queries - block.r1 : n_queries - block.r0, head].flip(1).to(self.dtype)

    def keys(self, x_BSGX: Tensor, block: Block, head: int) -> Tensor:
        """A block's keys or values for one query head, [b, s, X]."""
        return x_BSGX[block.b0 : block.b1, block.s0 : block.s1, self.key_head(head)].to(self.dtype)

    def blocks(self) -> Iterator[Block]:
        """Blocks in order of queries; keys that no query of a block can see are left out (none may remain)."""
        n_rows, n_queries = self.q_BTHK.shape[:2]
        n_keys = self.k_BSGK.shape[1]
        size = min(MAXQ, n_queries, max(MIN, min(256, 1 << int(math.log2(max(1, _BLOCK_LOGITS // n_keys))))))
        rows = max(1, min(n_rows, _BLOCK_LOGITS // (size * n_keys)))
        for b0 in range(0, n_rows, rows):
            for r0 in range(0, n_queries, size):
                r1 = min(r0 + size, n_queries)
                s0, s1 = 0, n_keys
                if self.aligned:
                    s0, s1 = max(0, self.visible_from - (r1 - 1)), min(n_keys, self.visible_to - r0)
                yield Block(b0, min(b0 + rows, n_rows), r0, r1, s0, max(s0, s1))


class Scratch:
    """Memory that the blocks of one call share: a name gives the same storage in every shape."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.stores: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        n_elements = math.prod(shape)
        store = self.stores.get(name)
        if store is None or store.numel() < n_elements:
            store = self.stores[name] = self.like.new_empty(n_elements)
        return store[:n_elements].view(shape)


@dataclass(frozen=True)
class Surroundings:
    """What the heads of a block share: its document mask, its entries of the bias (unless aligned), its dropout keys."""

    hidden_bRS: Tensor | None
    entry_RS: Tensor | None
    key_bR: Tensor | None
    word_S: Tensor | None


def surroundings(a: Inputs, block: Block) -> Surroundings:
    n_queries = a.q_BTHK.shape[1]
    tokens = slice(n_queries - block.r1, n_queries - block.r0)
    query_R, key_S = a.query_index_T[tokens].flip(0), a.key_index_S[block.s0 : block.s1]
    hidden = entry = key = word = None
    if a.query_document_BT is not None and a.key_document_BS is not None:
        query_bR = a.query_document_BT[block.b0 : block.b1, tokens].flip(1)
        hidden = (query_bR[:, :, None] != a.key_document_BS[block.b0 : block.b1, None, block.s0 : block.s1]).to(a.dtype).mul_(NEVER)
    if not a.aligned:
        entry = (a.first - (query_R[:, None] - key_S[None, :])).clamp_(0, a.bias_HM.shape[1] - 1)
    if a.dropout_key_B is not None:
        key, word = extend_keys(a.dropout_key_B[block.b0 : block.b1, None], query_R), column_words(key_S)
    return Surroundings(hidden, entry, key, word)


def keep_scaled(a: Inputs, around: Surroundings, head: int) -> Tensor | None:
    """Dropout's factors 0 or 1 / (1 - p), [b, R, s]."""
    if around.key_bR is None or around.word_S is None:
        return None
    key_bR = extend_keys(around.key_bR, torch.full_like(around.key_bR, a.first_head + head))
    return keep_from_bits(random_bits(key_bR, around.word_S), a.dropout_p).to(a.dtype).mul_(1.0 / (1.0 - a.dropout_p))


def logits(a: Inputs, block: Block, head: int, q_bRK: Tensor, around: Surroundings, scratch: Scratch) -> tuple[Tensor, Tensor | None]:
    """Logits [b, R, s] with every mask, in scratch memory, and the soft cap's tanh for the backward."""
    n_keys = block.s1 - block.s0
    score_bRS = scratch("score", *q_bRK.shape[:2], n_keys)
    k_bKS = a.keys(a.k_BSGK, block, head).transpose(1, 2)
    bias_M = a.bias_HM[head if a.bias_HM.shape[0] > 1 else 0]
    if around.entry_RS is None:
        start = block.r0 + block.s0
        bias_RS = bias_M[start : start + q_bRK.shape[1] + n_keys - 1].unfold(0, n_keys, 1)
    else:
        bias_RS = bias_M[around.entry_RS]
    if not a.soft_cap:
        if around.hidden_bRS is None:
            score_bRS.copy_(bias_RS)
        else:
            torch.add(around.hidden_bRS, bias_RS, out=score_bRS)
        return score_bRS.baddbmm_(q_bRK, k_bKS, alpha=a.scale), None
    tanh_bRS = torch.bmm(q_bRK, k_bKS, out=scratch("tanh", *score_bRS.shape)).mul_(a.scale / a.soft_cap).tanh_()
    torch.add(bias_RS, tanh_bRS, alpha=a.soft_cap, out=score_bRS)
    return score_bRS if around.hidden_bRS is None else score_bRS.add_(around.hidden_bRS), tanh_bRS


def forward(a: Inputs) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] in q's dtype; lse [B, T, H], the sink included, -inf where a query sees nothing."""
    n_rows, n_queries, n_heads = a.q_BTHK.shape[:3]
    y_BTHV = a.q_BTHK.new_empty(n_rows, n_queries, n_heads, a.v_BSGV.shape[3])
    lse_BTH = a.bias_HM.new_empty(n_rows, n_queries, n_heads)
    scratch = Scratch(a.bias_HM)
    for block in a.blocks():
        around = surroundings(a, block)
        tokens = slice(n_queries - block.r1, n_queries - block.r0)
        for head in range(n_heads):
            y_bRV, lse_bR = _forward_head(a, block, head, around, scratch)
            y_BTHV[block.b0 : block.b1, tokens, head] = y_bRV.flip(1)
            lse_BTH[block.b0 : block.b1, tokens, head] = lse_bR.flip(1)
    return y_BTHV, lse_BTH


def _forward_head(a: Inputs, block: Block, head: int, around: Surroundings, scratch: Scratch) -> tuple[Tensor, Tensor]:
    q_bRK = a.queries(a.q_BTHK, block, head)
    shape = q_bRK.shape[:2]
    sink = None if a.sinks_H is None else a.sinks_H[head].to(a.dtype)
    if block.s0 == block.s1:
        lse_bR = a.bias_HM.new_full(shape, -math.inf) if sink is None else sink.expand(shape)
        return a.bias_HM.new_zeros(*shape, a.v_BSGV.shape[3]), lse_bR
    score_bRS, _ = logits(a, block, head, q_bRK, around, scratch)
    p_bRS = torch.softmax(score_bRS, -1, out=scratch("p", *score_bRS.shape))
    top_bR = score_bRS.amax(-1)
    # The largest probability is exp(top - lse), at least 1/S: two maxima are cheaper than a second sum of exponentials.
    lse_bR = (top_bR - p_bRS.amax(-1).log_()).masked_fill_(top_bR < NEVER / 2, -math.inf)
    keep = keep_scaled(a, around, head)
    if keep is not None:
        p_bRS.mul_(keep)
    y_bRV = torch.bmm(p_bRS, a.keys(a.v_BSGV, block, head))
    if sink is None:
        return y_bRV.masked_fill_((lse_bR == -math.inf)[..., None], 0.0), lse_bR
    total_bR = torch.logaddexp(lse_bR, sink)
    return y_bRV.mul_((lse_bR - total_bR).exp_()[..., None]), total_bR


def unpack_grads(a: Inputs) -> "Gradients":
    zeros = a.bias_HM.new_zeros
    return Gradients(
        q=torch.empty_like(a.q_BTHK),
        k=zeros(a.k_BSGK.shape),
        v=zeros(a.v_BSGV.shape),
        bias=zeros(a.bias_HM.shape),
        sinks=zeros(0 if a.sinks_H is None else a.sinks_H.shape[0]),
    )


@dataclass(frozen=True)
class Gradients:
    """q in its dtype; the rest accumulated in the compute dtype; sinks empty without sinks."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    sinks: Tensor


def backward(a: Inputs, y_BTHV: Tensor, lse_BTH: Tensor, dy_BTHV: Tensor, dlse_BTH: Tensor | None, need_bias: bool) -> Gradients:
    """Gradients of everything that has one; the bias' stays zero unless ``need_bias``."""
    grads = unpack_grads(a)
    delta_BTH = (dy_BTHV.to(a.dtype) * y_BTHV.to(a.dtype)).sum(-1)
    if dlse_BTH is not None:
        delta_BTH -= dlse_BTH
    # P is a softmax without the sink times the share that the sink leaves; the share scales the query's upstream instead.
    share_BTH = (lse_BTH != -math.inf).to(a.dtype)
    if a.sinks_H is not None:
        over_BTH = a.sinks_H.to(a.dtype) - lse_BTH
        grads.sinks.copy_(-(over_BTH.exp() * delta_BTH).sum((0, 1)))
        share_BTH = over_BTH.expm1_().neg_()
    delta_BTH *= share_BTH
    scratch = Scratch(a.bias_HM)
    for block in a.blocks():
        if block.s0 == block.s1:
            n_queries = a.q_BTHK.shape[1]
            grads.q[block.b0 : block.b1, n_queries - block.r1 : n_queries - block.r0] = 0.0
            continue
        around = surroundings(a, block)
        for head in range(a.q_BTHK.shape[2]):
            share_bR1, delta_bR1 = (a.queries(x[..., None], block, head) for x in (share_BTH, delta_BTH))
            dy_bRV = a.queries(dy_BTHV, block, head).mul_(share_bR1)
            _backward_head(a, block, head, around, scratch, grads, (dy_bRV, delta_bR1), need_bias)
    return grads


def _backward_head(
    a: Inputs,
    block: Block,
    head: int,
    around: Surroundings,
    scratch: Scratch,
    grads: Gradients,
    upstream: tuple[Tensor, Tensor],
    need_bias: bool,
) -> None:
    dy_bRV, delta_bR1 = upstream
    q_bRK = a.queries(a.q_BTHK, block, head)
    n_queries, n_keys = q_bRK.shape[1], block.s1 - block.s0
    score_bRS, tanh_bRS = logits(a, block, head, q_bRK, around, scratch)
    p_bRS = torch.softmax(score_bRS, -1, out=scratch("p", *score_bRS.shape))
    keep = keep_scaled(a, around, head)
    rows, keys, key_head = slice(block.b0, block.b1), slice(block.s0, block.s1), a.key_head(head)
    dropped_bRS = p_bRS if keep is None else p_bRS * keep
    grads.v[rows, keys, key_head] += torch.bmm(dropped_bRS.transpose(1, 2), dy_bRV)
    dp_bRS = torch.bmm(dy_bRV, a.keys(a.v_BSGV, block, head).transpose(1, 2), out=scratch("dp", *p_bRS.shape))
    if keep is not None:
        dp_bRS.mul_(keep)
    dp_bRS.sub_(delta_bR1)
    if need_bias and a.aligned:
        # Rows one entry apart in width let the view below read dS along its diagonals; the margin must be zero.
        padded_bRW = scratch("ds", *q_bRK.shape[:2], n_queries + n_keys - 1)
        padded_bRW[..., n_keys:] = 0.0
        ds_bRS = torch.mul(p_bRS, dp_bRS, out=padded_bRW[..., :n_keys])
        width = padded_bRW.shape[2]
        sheared = padded_bRW.as_strided(padded_bRW.shape, (n_queries * width, width - 1, 1), padded_bRW.storage_offset())
        start = block.r0 + block.s0
        grads.bias[head if a.bias_HM.shape[0] > 1 else 0, start : start + width] += sheared.sum((0, 1))
    else:
        ds_bRS = dp_bRS.mul_(p_bRS)
        if need_bias and around.entry_RS is not None:
            row = grads.bias[head if a.bias_HM.shape[0] > 1 else 0]
            row.index_add_(0, around.entry_RS.flatten(), ds_bRS.sum(0).flatten())
    if tanh_bRS is not None:
        ds_bRS.mul_(tanh_bRS.square_().neg_().add_(1.0))
    dq_bRK = torch.bmm(ds_bRS, a.keys(a.k_BSGK, block, head)).mul_(a.scale)
    total = a.q_BTHK.shape[1]
    grads.q[rows, total - block.r1 : total - block.r0, head] = dq_bRK.flip(1).to(a.q_BTHK.dtype)
    grads.k[rows, keys, key_head] += torch.bmm(ds_bRS.transpose(1, 2), q_bRK.mul_(a.scale))
