"""Attention with a bias by distance through torch's CPU flash kernel, a block of queries at a time.

The kernel takes an additive mask, so the bias of a block, [H, R, S], is written out for that block alone and dropped: O(T)
memory, about half the work where the future is skipped, and on machines with matrix units (AMX) their bf16 speed. It gives
no gradient to the mask and knows neither soft cap nor dropout; :mod:`titanarch.ops._attention_chunked` does.

Shapes: B rows, T queries, S keys, H query heads, G key heads, K head dim, R queries of a block.
"""

import math

import torch
from torch import Tensor

from titanarch.ops._attention_blocks import Block, Gradients, Inputs
from titanarch.ops._attention_chunked import with_sinks
from titanarch.ops._attention_tokens import NEVER

_BLOCK_BIAS = 1 << 22
"""Bias entries of a block, elements: 16 MiB in float32."""


def fits(a: Inputs) -> bool:
    """Whether this kernel computes it: on the CPU, one head dim, no soft cap, no dropout."""
    same_dim = a.q_BTHK.shape[3] == a.v_BSGV.shape[3]
    return a.q_BTHK.device.type == "cpu" and same_dim and not a.soft_cap and a.dropout_key_B is None


def _heads_first(a: Inputs, x_BSGK: Tensor, block: Block) -> Tensor:
    """Keys or values of a block, [b, H, s, K], repeated for the query heads that share them."""
    x_bsGK = x_BSGK[block.rows, block.keys]
    if a.n_heads != x_BSGK.shape[2]:
        x_bsGK = x_bsGK.index_select(2, torch.tensor([a.key_head(head) for head in range(a.n_heads)]))
    return x_bsGK.transpose(1, 2)


def _add_heads(a: Inputs, total_BSGK: Tensor, part_bHsK: Tensor, block: Block) -> None:
    target_bsGK = total_BSGK[block.rows, block.keys]
    if a.n_heads == total_BSGK.shape[2]:
        target_bsGK += part_bHsK.transpose(1, 2)
        return
    for head in range(a.n_heads):
        target_bsGK[:, :, a.key_head(head)] += part_bHsK[:, head]


def _mask(a: Inputs, block: Block) -> Tensor:
    """The additive mask [B or 1, H or 1, R, s] of a block, its queries in order."""
    if a.aligned:
        start = block.r0 + block.s0
        bias_HRs = a.bias_HM[:, start : start + block.n_queries + block.n_keys - 1].unfold(1, block.n_keys, 1).flip(1)
    else:
        bias_HRs = a.bias_HM[:, a.entries(block).flip(0)]
    if a.query_document_BT is None or a.key_document_BS is None:
        return bias_HRs[None]
    hidden_bRs = a.query_document_BT[block.rows, a.tokens(block), None] != a.key_document_BS[block.rows, None, block.keys]
    hidden_b1Rs = hidden_bRs[:, None].to(a.dtype).mul_(NEVER)
    # In place where the shape allows: fresh memory of this size costs more than the addition.
    return bias_HRs[None].add_(hidden_b1Rs) if hidden_b1Rs.shape[0] == 1 else bias_HRs[None] + hidden_b1Rs


def _block_size(a: Inputs) -> tuple[int, int]:
    """Queries and rows of a block. Rows share a mask unless documents differ."""
    entries = a.bias_HM.shape[0] * a.k_BSGK.shape[1]
    if a.query_document_BT is None:
        return max(64, _BLOCK_BIAS // entries), a.q_BTHK.shape[0]
    n_queries = min(a.q_BTHK.shape[1], max(64, _BLOCK_BIAS // (a.q_BTHK.shape[0] * entries)))
    return n_queries, max(1, _BLOCK_BIAS // (n_queries * entries))


def forward(a: Inputs) -> tuple[Tensor, Tensor]:
    """As :func:`titanarch.ops._attention_chunked.forward`."""
    y_BTHV = torch.empty_like(a.q_BTHK)
    lse_BTH = a.bias_HM.new_empty(a.q_BTHK.shape[:3])
    for block in a.blocks(*_block_size(a)):
        where = (block.rows, a.tokens(block))
        if block.n_keys == 0:
            y_BTHV[where], lse_BTH[where] = 0.0, -math.inf
            continue
        y_bHRV, lse_bHR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            a.q_BTHK[where].transpose(1, 2),
            _heads_first(a, a.k_BSGK, block),
            _heads_first(a, a.v_BSGV, block),
            attn_mask=_mask(a, block),
            scale=a.scale,
        )
        y_BTHV[where], lse_BTH[where] = y_bHRV.transpose(1, 2), lse_bHR.transpose(1, 2)
    return with_sinks(y_BTHV, lse_BTH.masked_fill_(lse_BTH < NEVER / 2, -math.inf), a.sinks_H)


def backward(a: Inputs, y_BTHV: Tensor, lse_BTH: Tensor, dy_BTHV: Tensor) -> Gradients:
    """As :func:`titanarch.ops._attention_chunked.backward`, but the bias' gradient stays zero and lse has none.

    The kernel rebuilds ``P = exp(s - lse)`` and ``delta = sum dy y`` from what it is given, so an lse and a y that include a
    sink give the right gradients.
    """
    grads = Gradients.zeros(a)
    if a.sinks_H is not None:
        delta_BTH = (dy_BTHV.to(a.dtype) * y_BTHV.to(a.dtype)).sum(-1)
        grads.sinks.copy_(-((a.sinks_H.to(a.dtype) - lse_BTH).exp_() * delta_BTH).sum((0, 1)))
    # A query that sees nothing: any finite number makes exp(NEVER - lse) zero.
    lse_BTH = lse_BTH.masked_fill(lse_BTH == -math.inf, 0.0)
    for block in a.blocks(*_block_size(a)):
        if block.n_keys == 0:
            continue
        where = (block.rows, a.tokens(block))
        dq_bHRK, dk_bHsK, dv_bHsV = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy_BTHV[where].transpose(1, 2),
            a.q_BTHK[where].transpose(1, 2),
            _heads_first(a, a.k_BSGK, block),
            _heads_first(a, a.v_BSGV, block),
            y_BTHV[where].transpose(1, 2),
            lse_BTH[where].transpose(1, 2),
            0.0,
            False,
            attn_mask=_mask(a, block),
            scale=a.scale,
        )
        grads.q[where] = dq_bHRK.transpose(1, 2)
        _add_heads(a, grads.k, dk_bHsK, block)
        _add_heads(a, grads.v, dv_bHsV, block)
    return grads
