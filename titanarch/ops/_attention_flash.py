"""Attention with a bias by distance through torch's CPU flash kernel, a block of queries at a time.

The kernel takes an additive mask with any strides, so with the queries in reversed order a block's bias is a strided view on
the vector of the bias by distance, and nothing of [T, S] is written out; only documents add a mask of one block. The future
is skipped block by block, and machines with matrix units (AMX) give bf16 their speed. The kernel has no gradient for the
mask and knows neither soft cap nor dropout; :mod:`titanarch.ops._attention_chunked` does.

Shapes: B rows, T queries, S keys, H query heads, G key heads, K head dim; of a block b rows, R queries, s keys.
"""

import math

import torch
from torch import Tensor

from titanarch.ops._attention_blocks import Block, Gradients, Inputs, Scratch
from titanarch.ops._attention_chunked import with_sinks
from titanarch.ops._attention_tokens import NEVER

_BLOCK_MASK = 1 << 22
"""Entries of a block's document mask, elements: 16 MiB in float32."""


def fits(a: Inputs) -> bool:
    """Whether this kernel computes it: on the CPU, one head dim, no soft cap, no dropout."""
    same_dim = a.q_BTHK.shape[3] == a.v_BSGV.shape[3]
    return a.q_BTHK.device.type == "cpu" and same_dim and not a.soft_cap and a.dropout_key_B is None


def _heads_first(a: Inputs, x_BSGK: Tensor, block: Block) -> Tensor:
    """Keys or values of a block, [b, H, s, K], repeated for the query heads that share them."""
    x_bsGK = x_BSGK[block.rows, block.keys]
    if a.n_heads != x_BSGK.shape[2]:
        x_bsGK = x_bsGK[:, :, [a.key_head(head) for head in range(a.n_heads)]]
    return x_bsGK.transpose(1, 2)


def _mask(a: Inputs, block: Block, scratch: Scratch) -> Tensor:
    """The additive mask [b or 1, H or 1, R, s] of a block, its queries reversed."""
    if a.aligned:
        start = block.r0 + block.s0
        bias_HRs = a.bias_HM[:, start : start + block.n_queries + block.n_keys - 1].unfold(1, block.n_keys, 1)
    else:
        bias_HRs = a.bias_HM[:, a.entries(block)].contiguous()
    if a.query_document_BT is None or a.key_document_BS is None:
        return bias_HRs[None]
    query_bR = a.query_document_BT[block.rows, a.tokens(block)].flip(1)
    hidden_bRs = (query_bR[:, :, None] != a.key_document_BS[block.rows, None, block.keys]).to(a.dtype).mul_(NEVER)
    mask_bHRs = scratch("mask", hidden_bRs.shape[0], *bias_HRs.shape)
    return torch.add(bias_HRs[None], hidden_bRs[:, None], out=mask_bHRs)


def _block_size(a: Inputs) -> tuple[int, int]:
    """Queries and rows of a block: small ones skip more of the future, large ones add up fewer gradients of keys."""
    n_rows, n_keys = a.q_BTHK.shape[0], a.k_BSGK.shape[1]
    n_queries = min(a.q_BTHK.shape[1], max(64, min(n_keys // 8, 512)))
    if a.query_document_BT is None:
        return n_queries, n_rows
    n_queries = min(n_queries, max(64, _BLOCK_MASK // (a.bias_HM.shape[0] * n_keys)))
    return n_queries, max(1, _BLOCK_MASK // (a.bias_HM.shape[0] * n_queries * n_keys))


def forward(a: Inputs) -> tuple[Tensor, Tensor]:
    """As :func:`titanarch.ops._attention_chunked.forward`."""
    q_BTHK = a.q_BTHK.flip(1)
    y_BTHV = q_BTHK.new_empty(q_BTHK.shape)
    lse_BTH = a.bias_HM.new_empty(q_BTHK.shape[:3])
    scratch = Scratch(a.bias_HM)
    for block in a.blocks(*_block_size(a)):
        where = (block.rows, slice(block.r0, block.r1))
        if block.n_keys == 0:
            y_BTHV[where], lse_BTH[where] = 0.0, -math.inf
            continue
        y_bHRV, lse_bHR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BTHK[where].transpose(1, 2),
            _heads_first(a, a.k_BSGK, block),
            _heads_first(a, a.v_BSGV, block),
            attn_mask=_mask(a, block, scratch),
            scale=a.scale,
        )
        y_BTHV[where], lse_BTH[where] = y_bHRV.transpose(1, 2), lse_bHR.transpose(1, 2)
    return with_sinks(y_BTHV.flip(1), lse_BTH.masked_fill_(lse_BTH < NEVER / 2, -math.inf).flip(1), a.sinks_H)


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
    lse_BTH = lse_BTH.masked_fill(lse_BTH == -math.inf, 0.0).flip(1)
    q_BTHK, y_BTHV, dy_BTHV = a.q_BTHK.flip(1), y_BTHV.flip(1), dy_BTHV.flip(1)
    scratch = Scratch(a.bias_HM)
    for block in a.blocks(*_block_size(a)):
        if block.n_keys == 0:
            continue
        where = (block.rows, slice(block.r0, block.r1))
        dq_bHRK, dk_bHsK, dv_bHsV = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy_BTHV[where].transpose(1, 2),
            q_BTHK[where].transpose(1, 2),
            _heads_first(a, a.k_BSGK, block),
            _heads_first(a, a.v_BSGV, block),
            y_BTHV[where].transpose(1, 2),
            lse_BTH[where].transpose(1, 2),
            0.0,
            False,
            attn_mask=_mask(a, block, scratch),
            scale=a.scale,
        )
        grads.q[block.rows, a.tokens(block)] = dq_bHRK.transpose(1, 2).flip(1)
        a.add_keys(grads.k, dk_bHsK, block, slice(0, a.n_heads))
        a.add_keys(grads.v, dv_bHsV, block, slice(0, a.n_heads))
    return grads
