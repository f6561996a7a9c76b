"""Adam and SGD whose arithmetic runs on the shards themselves.

Both are elementwise, so a shard's update needs no other shard. Sending every list of DTensors through DTensor's dispatch
costs several times the update of a small model, and fused SGD has no DTensor form at all. The states stay DTensors, so
that checkpoints know how they lie.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.sgd import sgd


def shard_of(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this process holds, without a copy; a plain tensor is returned as it is.

    ``DTensor.to_local`` would make a new view of a parameter at every call.
    """
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class LocalAdam(torch.optim.Adam):
    """``torch.optim.Adam``, and with ``decoupled_weight_decay`` ``torch.optim.AdamW``, computed on local shards."""

    def _init_group(
        self,
        group: dict[str, object],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
    ) -> bool:
        """Fill the lists that the update reads: torch's own, then shards in place of DTensors."""
        has_complex = super()._init_group(group, params_with_grad, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
        for tensors in (params_with_grad, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs):
            tensors[:] = [shard_of(tensor) for tensor in tensors]
        return bool(has_complex)


class LocalSGD(torch.optim.SGD):
    """``torch.optim.SGD`` without dampening, computed on local shards."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("LocalSGD.step takes no closure")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            momenta: list[Tensor | None] = [None] * len(parameters)
            if group["momentum"]:
                momenta = [shard_of(self._momentum(p)) for p in parameters]
            sgd(
                [shard_of(p) for p in parameters],
                [shard_of(p.grad) for p in parameters],
                momenta,
                has_sparse_grad=False,
                foreach=group["foreach"],
                fused=group["fused"],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
            )

    def _momentum(self, parameter: Tensor) -> Tensor:
        """The parameter's momentum; zeros at first, which without dampening is what torch's first step amounts to."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        momentum: Tensor = state["momentum_buffer"]
        return momentum
