"""Between backward and the optimizer's step: the norm of all gradients, clipping, loss scaling."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titanarch.train.local_optimizers import shard_of

_LARGE, _ROW = 1 << 16, 4096
"""A CPU adds up a norm's squares one after the other, so that of 65,536 elements it is 2e-7 off, and of 40M already 3e-3."""

Measured = dict[tuple[str, ...], tuple[Tensor, list[int] | None]]
"""By the process groups that divide them: the norm of each gradient's part here, and which parameters had one; None: all."""


class GradientClipper:
    """The global 2-norm of the gradients, and clipping by it, in fp32 on local shards.

    Shards are summed over exactly the mesh axes that divide their parameter, with one reduction of a scalar an axis, so
    parameters on different meshes may be mixed and all processes get the same norm.
    """

    def __init__(self, parameters: Iterable[Tensor], max_norm: float) -> None:
        """``parameters``: all that are trained, once FSDP has divided them. ``max_norm``: inf measures and never clips."""
        self.max_norm = max_norm
        self._process_groups: dict[str, dist.ProcessGroup] = {}
        self.groups: dict[tuple[str, ...], list[Tensor]] = {}
        """The parameters by the process groups that divide them."""
        self.measured: Measured = {}
        """Of the last clipping."""
        for parameter in parameters:
            self.groups.setdefault(self._axes(parameter), []).append(parameter)

    @torch.no_grad()
    def clip(self, divide_by: float = 1.0) -> Tensor:
        """Divide the gradients, then scale them down to ``max_norm`` where their norm is above it.

        ``divide_by``: what the loss had been multiplied by. Returns the norm after the division and before clipping, an
        fp32 scalar on the gradients' device; nothing waits for an accelerator. As ``torch.nn.utils.clip_grad_norm_``,
        1e-6 is added to the norm. Gradients whose norm is not finite are of no use afterwards.
        """
        grads: list[Tensor] = []
        squares: dict[tuple[str, ...], Tensor] = {}
        self.measured = {}
        for axes, parameters in self.groups.items():
            shards = [shard_of(p.grad) for p in parameters if p.grad is not None]
            norms = _norms(shards, shard_of(parameters[0]).device)
            is_whole = len(shards) == len(parameters)
            self.measured[axes] = norms, None if is_whole else [place for place, p in enumerate(parameters) if p.grad is not None]
            squares[axes] = torch.linalg.vector_norm(norms).square_()
            grads += shards
        norm = self.sum_over_processes(squares).sqrt_()
        if divide_by != 1.0:
            norm.div_(divide_by)
        if not grads:
            return norm
        if norm.device.type == "cpu":
            scale = min(1.0, self.max_norm / (norm.item() + 1e-6)) / divide_by
            if scale != 1.0:  # reading the norm is free here, and saves a pass over all gradients
                torch._foreach_mul_(grads, scale)
        elif self.max_norm != math.inf or divide_by != 1.0:
            torch._foreach_mul_(grads, torch.clamp(self.max_norm / (norm + 1e-6), max=1.0).div_(divide_by))
        return norm

    def _axes(self, parameter: Tensor) -> tuple[str, ...]:
        """The process groups that divide ``parameter``, outermost mesh axis first."""
        if not isinstance(parameter, DTensor):
            return ()
        axes = []
        for axis, placement in enumerate(parameter.placements):
            if placement.is_partial():
                raise ValueError(f"a parameter holds partial sums on axis {axis} of its mesh: {parameter.placements}")
            process_group = parameter.device_mesh.get_group(axis)
            if not placement.is_replicate() and process_group.size() > 1:
                self._process_groups[process_group.group_name] = process_group
                axes.append(process_group.group_name)
        return tuple(axes)

    def sum_over_processes(self, squares: dict[tuple[str, ...], Tensor]) -> Tensor:
        """The sum of all ``squares``, of any one shape, by the process groups that they are to be summed over.

        Innermost axes first, joining what is left to be summed over the same axes.
        """
        while len(squares) > 1 or () not in squares:
            if not squares:
                return torch.zeros(())
            axes = max(squares, key=len)  # the first of the longest: the same on all processes
            total = squares.pop(axes)
            dist.all_reduce(total, group=self._process_groups[axes[-1]])
            outer = axes[:-1]
            squares[outer] = squares[outer] + total if outer in squares else total
        return squares[()]


def _norms(tensors: list[Tensor], device: torch.device) -> Tensor:
    """The 2-norm of each, fp32; fp64 of such."""
    if not tensors:
        return torch.zeros(0, device=device)
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    parts = [_norms_of_rows(tensor) if device.type == "cpu" and tensor.numel() > _LARGE else tensor for tensor in tensors]
    return torch.stack(torch._foreach_norm(parts, 2, dtype))


def _norms_of_rows(tensor: Tensor) -> Tensor:
    """The norms of rows of _ROW elements, and what is left: their norm is that of ``tensor``."""
    flat = tensor.flatten()
    n_whole = flat.numel() // _ROW * _ROW
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    rows = torch.linalg.vector_norm(flat[:n_whole].view(-1, _ROW), dim=1, dtype=dtype)
    return torch.cat([rows, flat[n_whole:].to(dtype)])


class LossScaler:
    """Dynamic loss scaling, so that small gradients survive float16; otherwise the scale is 1 and stays so.

    The scale halves when a gradient overflows, and doubles after 2,000 steps in a row without overflow. It is decided
    from the global norm, which all processes share.
    """

    GROWTH = 2.0
    BACKOFF = 0.5
    GROWTH_INTERVAL_STEPS = 2000
    FIRST_SCALE = 65536.0
    LEAST_SCALE = 1.0

    def __init__(self, *, enabled: bool) -> None:
        """``enabled``: whether compute is in float16."""
        self.enabled = enabled
        self.scale = self.FIRST_SCALE if enabled else 1.0
        self.overflows = 0
        self._good_steps = 0

    def update(self, *, finite: bool) -> bool:
        """Adjust the scale to a step; whether an overflow is explained by the scale, so that the step is only skipped."""
        if not self.enabled:
            return False
        if finite:
            self._good_steps += 1
            if self._good_steps == self.GROWTH_INTERVAL_STEPS:
                self.scale *= self.GROWTH
                self._good_steps = 0
            return False
        self._good_steps = 0
        if self.scale <= self.LEAST_SCALE:
            return False
        self.scale *= self.BACKOFF
        self.overflows += 1
        return True

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": self._good_steps, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self.enabled:
            self.scale = state["scale"]
            self._good_steps = int(state["good_steps"])
            self.overflows = int(state["overflows"])
