"""The layers whose arithmetic tensor parallelism must be able to reach: Linear, HeadParams, HeadNorm."""

from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes that share the heads; its backward is the sum's transpose."""

Multiply = Callable[[Tensor, Tensor], Tensor]
"""x [..., d_in] and W [d_out, d_in] to x W^T, [..., d_out]."""


@runtime_checkable
class DeclaresFp32(Protocol):
    """A module that names children whose parameters stay fp32 in compute: each becomes an FSDP unit of its own."""

    fp32: ClassVar[frozenset[str]]


def local(parameter: Tensor) -> Tensor:
    """What this process computes with: its shard of a divided parameter, all of a shared one.

    A parameter that tensor parallelism holds whole is used on local heads only, so its gradient is a part of a sum.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    grad_placements = [p if p.is_shard() else Partial() for p in parameter.placements]
    return parameter.to_local(grad_placements=grad_placements)


class Linear(nn.Linear):
    """y = x W^T + b. x: [..., d_in]; y: [..., d_out], or the local part of either under tensor parallelism.

    ``reduce_output`` is injected by parallel/ into layers divided by input: it sums the partial products before the
    bias, which is not divided, is added. ``multiply`` too is injected, where the product is computed in another format.
    """

    reduce_output: Reduce | None = None
    multiply: Multiply | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.reduce_output is None and self.multiply is None:
            return F.linear(x, local(self.weight), None if self.bias is None else local(self.bias))
        y = (self.multiply or F.linear)(x, local(self.weight))
        y = y if self.reduce_output is None else self.reduce_output(y)
        return y if self.bias is None else y + local(self.bias)


class HeadParams(nn.Module):
    """Parameters that stay fp32 in compute, in an FSDP unit of their own; calling it returns them by name.

    It is a module of its own because a bf16 unit casts every parameter in it. ``shapes``: name to global shape.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))

    def forward(self) -> dict[str, Tensor]:
        return {name: local(parameter) for name, parameter in self.named_parameters(recurse=False)}


class HeadNorm(nn.Module):
    """RMS norm over groups of channels that may span heads: x / sqrt(mean x^2 + eps) * gain.

    ``n_groups``: how many groups the heads form; 1 normalizes over all heads, so under tensor parallelism the sum of
    squares crosses processes: ``reduce`` is injected by parallel/, and ``degree`` is how many share the heads.
    """

    reduce: Reduce | None = None
    degree: int = 1

    def __init__(self, n_groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.n_groups = n_groups
        self.eps = eps

    def forward(self, x_BTHV: Tensor, gain_HV: Tensor) -> Tensor:
        """x: [B, T, H, V] of the local heads; gain: [H, V]. Statistics in fp32 at least."""
        x = x_BTHV.to(torch.promote_types(x_BTHV.dtype, torch.float32))
        if self.n_groups % self.degree == 0:
            x_BTGC = x.unflatten(2, (self.n_groups // self.degree, -1)).flatten(3)
            y = (x_BTGC * torch.rsqrt(x_BTGC.square().mean(-1, keepdim=True) + self.eps)).reshape(x.shape)
        elif self.n_groups == 1 and self.reduce is not None:
            squares = self.reduce(x.square().sum((2, 3), keepdim=True))
            y = x * torch.rsqrt(squares / (self.degree * x.shape[2] * x.shape[3]) + self.eps)
        else:
            raise ValueError(f"HeadNorm: {self.n_groups} groups cannot be divided among {self.degree} processes; use 1 or a multiple")
        return (y * gain_HV).to(x_BTHV.dtype)
