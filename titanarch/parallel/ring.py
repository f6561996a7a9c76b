"""Ring context parallelism: keys pass round the processes, and each merges what its queries read of them.

Part j of a row gives query i the mean y_ij over its own keys and the log-sum-exp lse_ij of their logits. Merged
(arXiv:2310.01889),

    lse_i = log(sum_j exp(lse_ij)),    w_ij = exp(lse_ij - lse_i),    y_i = sum_j w_ij y_ij

and since w is a softmax over parts, the gradients that reach part j are

    dy_ij = w_ij dy_i,    dlse_ij = w_ij (dy_i . y_ij - dy_i . y_i)

The backward is a ring too: keys pass round again with their gradients, each part is computed again and differentiated by
itself. A process keeps its own streams, y and lse, never another's keys. Merging, and the sums of gradients, are in float32
(float64 where the mix gives its lse so).

Shapes: B rows, T tokens of this process, t tokens of a part, H query heads, V value dim.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from titanarch.parallel.context_layout import ContextLayout

Tensors = Sequence[Tensor]


class PartMix(Protocol):
    """The mix of some queries with some keys; a pure function of its tensors."""

    def __call__(self, number: int, part: int, queries: Tensors, keys: Tensors, params: Tensors) -> tuple[Tensor, Tensor]:
        """What part ``number`` of the tokens here reads in part ``part`` of the row: y [B, t, H, V] and lse [B, t, H]."""


def mix_in_ring(layout: ContextLayout, mix: PartMix, queries: Tensors, keys: Tensors, params: Tensors) -> Tensor:
    """y [B, T, H, V] of the queries here over all earlier keys of the row. Collective, and so is its backward.

    ``queries``, ``keys``: streams [B, T, heads, ...] of this process's tokens. ``params``: what every part reads. Parts that
    lie wholly after a query are skipped: every mixer is causal. There is no second derivative.
    """
    y_BTHV: Tensor = _Ring.apply(_Call(layout, mix, len(queries), len(keys)), *queries, *keys, *params)
    return y_BTHV


@dataclass(frozen=True)
class _Call:
    layout: ContextLayout
    mix: PartMix
    n_queries: int
    n_keys: int

    def split(self, tensors: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """Queries, keys and params."""
        n, m = self.n_queries, self.n_queries + self.n_keys
        return tensors[:n], tensors[n:m], tensors[m:]

    def reads(self, step: int) -> Iterator[tuple[int, int, int]]:
        """Number of a part here, number of one that has come by ``step``, and its number in the row."""
        layout = self.layout
        for number, own in enumerate(layout.own_parts):
            for held, part in enumerate(layout.parts_of((layout.rank - step) % layout.degree)):
                if part <= own:
                    yield number, held, part

    def tensors_of(self, number: int, held: int, tensors: Tensors, keys: Tensors) -> list[Tensor]:
        """Of ``tensors`` the queries of a part here, with a part of the ``keys`` that came, and the params."""
        queries, _, params = self.split(tensors)
        parts = self.layout.parts
        return [*(parts(x)[number] for x in queries), *(parts(x)[held] for x in keys), *params]


class _Passing:
    """Tensors on their way to the next process, while those of the one before come here."""

    def __init__(self, tensors: Tensors, group: ProcessGroup) -> None:
        degree, rank = group.size(), group.rank()
        self.sent = [x.contiguous() for x in tensors]
        self.coming = []
        for x in self.sent:
            outgoing, incoming = [0] * degree, [0] * degree
            outgoing[(rank + 1) % degree] = incoming[(rank - 1) % degree] = x.numel()
            self.coming.append(funcol.all_to_all_single(x.flatten(), incoming, outgoing, group))

    def wait(self) -> list[Tensor]:
        return [funcol.wait_tensor(x).view(sent.shape) for x, sent in zip(self.coming, self.sent, strict=True)]


def _weight(lse: Tensor, total: Tensor) -> Tensor:
    """exp(lse - total) [..., 1]; 0 where nothing was seen at all."""
    return torch.exp(lse - total.masked_fill(total == -math.inf, 0.0))[..., None]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:
        layout, (_, keys, _) = call.layout, call.split(tensors)
        merged: list[tuple[Tensor, Tensor] | None] = [None] * len(layout.own_parts)
        dtype = tensors[0].dtype
        for step in range(layout.degree):
            coming = _Passing(keys, layout.group) if step + 1 < layout.degree else None
            for number, held, part in call.reads(step):
                y, lse = call.mix(number, part, *call.split(call.tensors_of(number, held, tensors, keys)))
                dtype, before = y.dtype, merged[number]
                merged[number] = (y.to(lse.dtype), lse) if before is None else _merge(*before, y, lse)
            if coming is not None:
                keys = coming.wait()
        found = [each for each in merged if each is not None]
        assert len(found) == len(merged), "every part reads itself"
        y_BTHV, lse_BTH = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        y_BTHV = y_BTHV.to(dtype)
        ctx.call = call
        ctx.save_for_backward(*tensors, y_BTHV, lse_BTH)
        return y_BTHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, y_BTHV, lse_BTH = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        sums = _gradients(ctx.call, tensors, needed, y_BTHV, lse_BTH, dy_BTHV)
        return None, *(grad.to(x.dtype) if need else None for x, need, grad in zip(tensors, needed, sums, strict=True))


def _merge(y: Tensor, lse: Tensor, y_part: Tensor, lse_part: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(lse, lse_part)
    return y * _weight(lse, total) + y_part * _weight(lse_part, total), total


def _gradients(call: _Call, tensors: Tensors, needed: Sequence[bool], y_BTHV: Tensor, lse_BTH: Tensor, dy_BTHV: Tensor) -> list[Tensor]:
    """Of all ``tensors``, in their order; zero where none is ``needed``."""
    layout, (queries, keys, params) = call.layout, call.split(tensors)
    dy_BTHV = dy_BTHV.to(lse_BTH.dtype)
    results = (lse_BTH, dy_BTHV, (dy_BTHV * y_BTHV).sum(-1))
    d_queries, d_params = _zeros(queries), _zeros(params)
    travelling = None
    for step in range(layout.degree):
        coming = _Passing(keys, layout.group) if step + 1 < layout.degree else None
        d_keys = _zeros(keys)
        for number, held, part in call.reads(step):
            given = call.tensors_of(number, held, tensors, keys)
            sums = call.tensors_of(number, held, [*d_queries, *d_keys, *d_params], d_keys)
            found = _part_gradients(call, number, part, given, needed, [layout.parts(x)[number] for x in results])
            for total, grad in zip(sums, found, strict=True):
                if grad is not None:
                    total += grad
        if travelling is not None:  # the sums of those who had these keys before
            d_keys = [here + before for here, before in zip(d_keys, travelling.wait(), strict=True)]
        travelling = _Passing(d_keys, layout.group)
        if coming is not None:
            keys = coming.wait()
    assert travelling is not None, "a group has a process"
    return [*d_queries, *travelling.wait(), *d_params]


def _zeros(tensors: Tensors) -> list[Tensor]:
    return [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def _part_gradients(
    call: _Call, number: int, part: int, given: Tensors, needed: Sequence[bool], results: Tensors
) -> Iterator[Tensor | None]:
    """Gradients of ``given`` through one part. ``results``: lse, dy and dy . y of its queries over all parts."""
    lse, dy, delta = results
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(need) for x, need in zip(given, needed, strict=True)]
        y_part, lse_part = call.mix(number, part, *call.split(leaves))
    weight = _weight(lse_part.detach(), lse)
    dy_part = dy * weight
    dlse_part = (dy_part * y_part.detach()).sum(-1) - delta * weight.squeeze(-1)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad((y_part, lse_part), wanted, (dy_part.to(y_part.dtype), dlse_part), allow_unused=True))
    return (next(found) if leaf.requires_grad else None for leaf in leaves)


__all__ = ["PartMix", "mix_in_ring"]
