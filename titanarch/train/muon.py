"""Muon (Jordan et al., 2024; learning-rate scaling of arXiv:2502.16982) for matrices divided among processes.

Shapes: A rows, B columns of a whole matrix.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from titanarch.train.local_optimizers import shard_of

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose iteration drives every singular value towards 1."""
_EPS = 1e-7
_MATCHED_RMS = 0.2
"""Root mean square of a typical AdamW update, in units of its learning rate."""


def orthogonalize(matrix_AB: Tensor, n_iterations: int) -> Tensor:
    """The nearest matrix with singular values near 1, by Newton-Schulz iterations in bf16; [A, B] bf16."""
    a, b, c = _COEFFICIENTS
    tall = matrix_AB.shape[0] > matrix_AB.shape[1]
    x = matrix_AB.bfloat16()
    if tall:
        x = x.T  # the Gram matrix of the shorter side is the smaller one
    x = x / x.norm().clamp(min=_EPS)  # the Frobenius norm bounds the largest singular value
    for _ in range(n_iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class LocalMuon(torch.optim.Muon):
    """``torch.optim.Muon``: the same states and, on whole matrices, the same numbers.

    A divided matrix is gathered once, in bf16, and every process computes the whole update and keeps its shard. So
    the result does not depend on the mesh, where products of sharded bf16 matrices would, and a matrix costs one
    collective in place of more than ten.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("LocalMuon.step takes no closure")
        for group in self.param_groups:
            parameters: list[Tensor] = []
            grads: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, parameters, grads, momenta)
            if not parameters:
                continue
            grads = [shard_of(grad) for grad in grads]
            momenta = [shard_of(momentum) for momentum in momenta]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            directions = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
            torch._foreach_mul_([shard_of(p) for p in parameters], 1 - group["lr"] * group["weight_decay"])
            for parameter, direction in zip(parameters, directions, strict=True):
                update = _orthogonal_shard(direction, parameter, group["ns_steps"])
                shard_of(parameter).add_(update, alpha=-group["lr"] * _lr_factor(group["adjust_lr_fn"], *parameter.shape))


def _orthogonal_shard(direction: Tensor, parameter: Tensor, n_iterations: int) -> Tensor:
    """This process's part of the orthogonalized direction; ``direction`` is its part of the direction."""
    if not isinstance(parameter, DTensor):
        return orthogonalize(direction, n_iterations)
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    whole_AB = DTensor.from_local(direction.bfloat16(), mesh, placements, run_check=False, shape=shape, stride=stride).full_tensor()
    update_AB = orthogonalize(whole_AB, n_iterations).contiguous()
    return shard_of(distribute_tensor(update_AB, mesh, placements, src_data_rank=None))


def _lr_factor(adjust_lr_fn: str, n_rows: int, n_columns: int) -> float:
    """What the learning rate of a matrix is multiplied by, from its whole shape."""
    if adjust_lr_fn == "match_rms_adamw":
        return float(_MATCHED_RMS * max(n_rows, n_columns) ** 0.5)
    return float(max(1.0, n_rows / n_columns) ** 0.5)
