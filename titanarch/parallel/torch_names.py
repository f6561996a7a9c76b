"""Names that differ between the supported versions of torch (2.11 to 2.13), in one place."""

import torch
import torch.distributed._functional_collectives as funcol
from torch.distributed.fsdp import FSDPModule

_TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])

if _TORCH >= (2, 13):
    all_gather = funcol.all_gather_single
    reduce_scatter = funcol.reduce_scatter_single
else:
    all_gather = funcol.all_gather_tensor
    reduce_scatter = funcol.reduce_scatter_tensor


def remove_forward_hooks(unit: FSDPModule) -> None:
    """Make an FSDP unit's forward an ordinary one: somebody else calls its ``unshard`` before."""
    state = unit._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
