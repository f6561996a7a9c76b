"""Names that differ between the supported versions of torch (2.11 to 2.13), in one place."""

import torch
import torch.distributed._functional_collectives as funcol

_TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])

if _TORCH >= (2, 13):
    all_gather = funcol.all_gather_single
    reduce_scatter = funcol.reduce_scatter_single
else:
    all_gather = funcol.all_gather_tensor
    reduce_scatter = funcol.reduce_scatter_tensor
