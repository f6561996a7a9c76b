"""Adam whose arithmetic runs on the shards themselves.

Adam is elementwise, so a shard's update needs no other shard. Sending every list of DTensors through DTensor's dispatch
costs several times the update of a small model; the states stay DTensors, so that checkpoints know how they lie.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


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
