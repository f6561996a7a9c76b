"""Products of rows with the matrix of their group, as a mixture of experts needs them: y_n = W_e x_n for the rows n of group e.

Rows lie group after group, and group e ends before row ``ends_E[e]``; a group may be empty. ``grouped_mm`` takes ``F.grouped_mm`` for
bfloat16 on CUDA, where one kernel serves all groups. Elsewhere it is an operator of this project, a product a group: any dtype and
device, opaque to torch.compile (so fullgraph holds, in float32 too, where torch's own traces in no backend), differentiable twice.
On CUDA that operator waits for the ends to reach the host.

Shapes: N rows, E groups, D inputs, F outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 8
"""torch's kernel reads 16 bytes at a time, so rows are of a multiple of 8 bfloat16 numbers."""


def grouped_mm(x_ND: Tensor, w_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """[N, F] in x's dtype. ``ends_E``: int32, not decreasing, the last one N."""
    if has_kernel(x_ND.device.type, x_ND.dtype, w_EFD.shape[1], w_EFD.shape[2]):
        return F.grouped_mm(x_ND, w_EFD.transpose(1, 2), offs=ends_E)
    out: Tensor = grouped_mm_operator(x_ND, w_EFD, ends_E)
    return out


def has_kernel(device_type: str, dtype: torch.dtype, d_out: int, d_in: int) -> bool:
    """Whether torch's kernel for all groups at once can be used."""
    return device_type == "cuda" and dtype is torch.bfloat16 and d_out % ALIGNMENT == 0 and d_in % ALIGNMENT == 0


def _groups(ends_E: Tensor) -> list[slice]:
    ends = ends_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


@torch.library.custom_op("titanarch::grouped_mm", mutates_args=())
def grouped_mm_operator(x_ND: Tensor, w_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """[N, F]: a product a group, the plain-torch reference."""
    y_NF = x_ND.new_empty(x_ND.shape[0], w_EFD.shape[1])
    for w_FD, rows in zip(w_EFD.unbind(), _groups(ends_E), strict=True):
        torch.mm(x_ND[rows], w_FD.T, out=y_NF[rows])
    return y_NF


@grouped_mm_operator.register_fake
def _(x_ND: Tensor, w_EFD: Tensor, ends_E: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape[0], w_EFD.shape[1])


@torch.library.custom_op("titanarch::grouped_outer", mutates_args=())
def grouped_outer_operator(y_NF: Tensor, x_ND: Tensor, ends_E: Tensor) -> Tensor:
    """[E, F, D]: the sum of y_n x_n^T over each group."""
    out_EFD = x_ND.new_empty(ends_E.shape[0], y_NF.shape[1], x_ND.shape[1])
    for out_FD, rows in zip(out_EFD.unbind(), _groups(ends_E), strict=True):
        torch.mm(y_NF[rows].T, x_ND[rows], out=out_FD)
    return out_EFD


@grouped_outer_operator.register_fake
def _(y_NF: Tensor, x_ND: Tensor, ends_E: Tensor) -> Tensor:
    return x_ND.new_empty(ends_E.shape[0], y_NF.shape[1], x_ND.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_of_mm(ctx: Any, dy_NF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_ND, w_EFD, ends_E = ctx.saved_tensors
    dx_ND = grouped_mm_operator(dy_NF, w_EFD.transpose(1, 2), ends_E) if ctx.needs_input_grad[0] else None
    dw_EFD = grouped_outer_operator(dy_NF, x_ND, ends_E) if ctx.needs_input_grad[1] else None
    return dx_ND, dw_EFD, None


def _backward_of_outer(ctx: Any, dout_EFD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    y_NF, x_ND, ends_E = ctx.saved_tensors
    dy_NF = grouped_mm_operator(x_ND, dout_EFD, ends_E) if ctx.needs_input_grad[0] else None
    dx_ND = grouped_mm_operator(y_NF, dout_EFD.transpose(1, 2), ends_E) if ctx.needs_input_grad[1] else None
    return dy_NF, dx_ND, None


grouped_mm_operator.register_autograd(_backward_of_mm, setup_context=_save)
grouped_outer_operator.register_autograd(_backward_of_outer, setup_context=_save)
