"""Collectives with the backward that each needs. All take and return contiguous tensors of one dtype.

``group`` is a process group; its processes call in the same order. The autograd functions take its name, which
torch.compile can write into a graph.
"""

from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed import ProcessGroup

from titanarch.parallel.torch_names import all_gather, reduce_scatter


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return funcol.wait_tensor(funcol.all_reduce(grad.contiguous(), "sum", ctx.group)), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sum_gradients(x: Tensor, group: ProcessGroup) -> Tensor:
    """``x`` as it is; its gradient is summed over ``group``. For what is alike on all and used in parts by each."""
    out: Tensor = _SumGradients.apply(x, group.group_name)
    return out


def sum_parts(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of ``x`` over ``group``, used alike on all; the gradient of each part is that of the sum."""
    out: Tensor = _Sum.apply(x, group.group_name)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return funcol.wait_tensor(all_gather(x.contiguous(), 0, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return funcol.wait_tensor(reduce_scatter(grad.contiguous(), "sum", 0, ctx.group)), None


def gather_stacked(x: Tensor, group: ProcessGroup) -> Tensor:
    """[...] of each process to [degree, ...]; gradients are summed and cut back.

    Every process must let its gradient flow, be it zero: the backward is a collective too.
    """
    out: Tensor = _Gather.apply(x[None], group.group_name)
    return out


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, degree: int) -> Tensor:
        ctx.group, ctx.degree = group, degree
        return _gathered(x, group, degree)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scattered(grad, ctx.group, ctx.degree), None, None


class _ScatterSumSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, degree: int) -> Tensor:
        ctx.group, ctx.degree = group, degree
        return _scattered(x, group, degree)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grad, ctx.group, ctx.degree), None, None


def _gathered(x: Tensor, group: Any, degree: int) -> Tensor:
    """Written as TorchInductor's asynchronous tensor parallelism looks for it: gather, then split and concatenate."""
    return torch.cat(funcol.wait_tensor(all_gather(x.contiguous(), 0, group)).chunk(degree, 0), 1)


def _scattered(x: Tensor, group: Any, degree: int) -> Tensor:
    """Split and concatenate, then reduce and scatter, for the same reason."""
    return funcol.wait_tensor(reduce_scatter(torch.cat(x.chunk(degree, 1), 0), "sum", 0, group))


def gather_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """[B, T, ...] of each process to [B, T degree, ...] in the order of ranks; gradients are summed and cut back."""
    out: Tensor = _GatherSequence.apply(x, group.group_name, group.size())
    return out


def scatter_sum_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """[B, T degree, ...], of which each process holds a part of a sum, to this process's [B, T, ...] of the sum."""
    out: Tensor = _ScatterSumSequence.apply(x, group.group_name, group.size())
    return out


def sequence_to_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """[B, T, heads, ...] of all heads to [B, T degree, heads / degree, ...] of whole rows, by all-to-all."""
    degree = group.size()
    parts = x.unflatten(2, (degree, -1)).movedim(2, 0).contiguous()
    received = funcol.all_to_all_single_autograd(parts, None, None, group)
    return funcol.wait_tensor(received).movedim(0, 1).flatten(1, 2)


def heads_to_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """The inverse of ``sequence_to_heads``."""
    degree = group.size()
    parts = x.unflatten(1, (degree, -1)).movedim(1, 0).contiguous()
    received = funcol.all_to_all_single_autograd(parts, None, None, group)
    return funcol.wait_tensor(received).movedim(0, 2).flatten(2, 3)
