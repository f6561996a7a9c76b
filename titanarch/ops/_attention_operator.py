"""The CPU kernels of attention as one differentiable torch operator.

It is opaque to torch.compile (fullgraph), so the loops over blocks are not unrolled into a graph, and it is one name for
selective activation checkpointing: ``torch.ops.titanarch.biased_attention.default``. It has no second derivative.
"""

from typing import Any

import torch
from torch import Tensor

from titanarch.ops import _attention_chunked, _attention_flash
from titanarch.ops._attention_blocks import Inputs


@torch.library.custom_op("titanarch::biased_attention", mutates_args=())
def biased_attention_operator(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    bias_HM: Tensor,
    first: int,
    visible_from: int,
    visible_to: int,
    aligned: bool,
    query_index_T: Tensor,
    key_index_S: Tensor,
    query_document_BT: Tensor | None,
    key_document_BS: Tensor | None,
    sinks_H: Tensor | None,
    dropout_key_B: Tensor | None,
    dropout_p: float,
    first_head: int,
    scale: float,
    soft_cap: float,
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] in q's dtype and lse [B, T, H] in the bias' dtype; arguments as :class:`Inputs`."""
    a = Inputs(
        q_BTHK, k_BSGK, v_BSGV, bias_HM, first, visible_from, visible_to, aligned, query_index_T, key_index_S,
        query_document_BT, key_document_BS, sinks_H, dropout_key_B, dropout_p, first_head, scale, soft_cap,
    )  # fmt: skip
    return (_attention_flash if _attention_flash.fits(a) else _attention_chunked).forward(a)


@biased_attention_operator.register_fake
def _(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, bias_HM: Tensor, *_rest: object) -> tuple[Tensor, Tensor]:
    return q_BTHK.new_empty(*q_BTHK.shape[:3], v_BSGV.shape[3]), bias_HM.new_empty(q_BTHK.shape[:3])


@torch.library.custom_op("titanarch::biased_attention_backward", mutates_args=())
def biased_attention_backward_operator(
    dy_BTHV: Tensor,
    dlse_BTH: Tensor | None,
    y_BTHV: Tensor,
    lse_BTH: Tensor,
    need_bias: bool,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    bias_HM: Tensor,
    first: int,
    visible_from: int,
    visible_to: int,
    aligned: bool,
    query_index_T: Tensor,
    key_index_S: Tensor,
    query_document_BT: Tensor | None,
    key_document_BS: Tensor | None,
    sinks_H: Tensor | None,
    dropout_key_B: Tensor | None,
    dropout_p: float,
    first_head: int,
    scale: float,
    soft_cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the bias by distance (zero unless ``need_bias``) and the sinks (empty without them)."""
    a = Inputs(
        q_BTHK, k_BSGK, v_BSGV, bias_HM, first, visible_from, visible_to, aligned, query_index_T, key_index_S,
        query_document_BT, key_document_BS, sinks_H, dropout_key_B, dropout_p, first_head, scale, soft_cap,
    )  # fmt: skip
    if _attention_flash.fits(a) and not need_bias and dlse_BTH is None:
        grads = _attention_flash.backward(a, y_BTHV, lse_BTH, dy_BTHV)
    else:
        grads = _attention_chunked.backward(a, y_BTHV, lse_BTH, dy_BTHV, dlse_BTH, need_bias)
    return grads.q, grads.k.to(k_BSGK.dtype), grads.v.to(v_BSGV.dtype), grads.bias, grads.sinks


@biased_attention_backward_operator.register_fake
def _(
    dy_BTHV: Tensor, dlse_BTH: Tensor | None, y_BTHV: Tensor, lse_BTH: Tensor, need_bias: bool, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q_BTHK, k_BSGK, v_BSGV, bias_HM = inputs[:4]
    sinks_H = inputs[12]
    sinks = bias_HM.new_empty(0 if sinks_H is None else sinks_H.shape[0])
    k, v = k_BSGK.new_empty(k_BSGK.shape), v_BSGV.new_empty(v_BSGV.shape)
    return q_BTHK.new_empty(q_BTHK.shape), k, v, bias_HM.new_empty(bias_HM.shape), sinks


_TENSORS = (0, 1, 2, 3, 8, 9, 10, 11, 12, 13)
"""Which of the operator's inputs are tensors or None."""


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # an unused lse costs nothing
    ctx.save_for_backward(*(inputs[i] for i in _TENSORS), *output)
    ctx.plain = tuple(None if i in _TENSORS else value for i, value in enumerate(inputs))


def _backward(ctx: Any, dy_BTHV: Tensor | None, dlse_BTH: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, y_BTHV, lse_BTH = ctx.saved_tensors
    inputs = list(ctx.plain)
    for i, tensor in zip(_TENSORS, tensors, strict=True):
        inputs[i] = tensor
    if dy_BTHV is None:
        dy_BTHV = torch.zeros_like(y_BTHV)
    needs = ctx.needs_input_grad
    q, k, v, bias, sinks = biased_attention_backward_operator(dy_BTHV, dlse_BTH, y_BTHV, lse_BTH, needs[3], *inputs)
    grads: list[Tensor | None] = [None] * len(inputs)
    grads[0], grads[1], grads[2] = q, k, v
    if needs[3]:
        grads[3] = bias
    if inputs[12] is not None:
        grads[12] = sinks.to(inputs[12].dtype)
    return tuple(grads)


biased_attention_operator.register_autograd(_backward, setup_context=_setup_context)
