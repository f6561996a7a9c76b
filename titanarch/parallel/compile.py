"""torch.compile a block at a time, whole graphs, one shape."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch._dynamo
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule

from titanarch.contract.model import Model
from titanarch.contract.sequence import SequenceInfo
from titanarch.parallel.config import CompileConfig
from titanarch.parallel.torch_names import remove_forward_hooks

GRAPHS_A_BLOCK = 16
"""Variants of a block's graph that torch may compile before it gives up; a run needs one for each shape of its micro-batches."""


def apply_compile(model: Model, config: CompileConfig) -> None:
    """Compile the forward of each block of ``model``, or of what it has compiled. After activation checkpointing, before FSDP.

    Hooks of the block run outside of the graph, those of its parts inside.
    """
    blocks = list(model.compiled())
    # Blocks share their code, and torch counts graphs by code: their layer numbers alone make as many variants.
    limit = GRAPHS_A_BLOCK * len(blocks)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, limit)
    # By default nothing that an FSDP module holds is guarded, so one block's layer number would serve for all.
    torch._dynamo.config.skip_fsdp_guards = False
    # The backward of ring context parallelism differentiates one part at a time.
    torch._dynamo.config.trace_autograd_ops = True
    for block in blocks:
        block.forward = CompiledInTraining(block.forward, config)


def gather_before_graphs(model: Model) -> None:
    """Let FSDP units inside compiled blocks be gathered before a block's graph, which cannot hold FSDP's hooks. After FSDP.

    They are the parts that stay fp32, so they exist in low precision only. Nothing else changes for them: they are
    resharded and their gradients reduced at the end of the backward.
    """
    for block in model.compiled():
        compiled = block.forward
        assert isinstance(compiled, CompiledInTraining), "apply_compile comes first"
        for module in block.modules():
            if isinstance(module, FSDPModule) and module is not block:
                remove_forward_hooks(module)
                compiled.gathered.append(module)


def overlap_tensor_parallelism(group: ProcessGroup) -> None:
    """Let TorchInductor cut the products beside ``group``'s collectives into pieces that run while others travel. CUDA only."""
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(group.group_name)


class CompiledInTraining:
    """``forward`` as one graph where gradients are recorded, as it is where they are not.

    Evaluation has rows of many lengths and numbers, each of which would be compiled. ``gathered``: FSDP units inside.
    """

    def __init__(self, forward: Callable[..., Any], config: CompileConfig) -> None:
        self.forward = forward
        self.gathered: list[FSDPModule] = []
        self.compiled = torch.compile(forward, backend=config.backend, fullgraph=True, dynamic=False)

    def __call__(self, *arguments: Any) -> Any:
        for unit in self.gathered:
            unit.unshard()
        if not torch.is_grad_enabled():
            return self.forward(*arguments)
        return self.compiled(*(as_packed(x) if isinstance(x, SequenceInfo) else x for x in arguments))


def as_packed(seq: SequenceInfo) -> SequenceInfo:
    """The same rows without the promise that each is one document, which would need a graph of its own."""
    return replace(seq, packed=True, undivided=None if seq.undivided is None else as_packed(seq.undivided))
