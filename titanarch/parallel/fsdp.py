"""FSDP2 on every run, also on one process, so that there is one code path: fp32 masters, compute in another dtype.

Each block is a unit, what a component declares fp32 is a unit inside it, and the root holds embedding, final norm and
head. Gradients are summed over processes, not averaged: the loss is already divided by the global target count.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from titanarch.contract.layers import DeclaresFp32
from titanarch.contract.model import Model
from titanarch.parallel.config import ParallelismConfig

METHODS_WITH_PARAMETERS = ("token_losses", "logits", "step")
"""Methods of a Model beside forward that use its parameters, so FSDP must gather for them too."""


def apply_fsdp(model: Model, data_mesh: DeviceMesh, config: ParallelismConfig, param_dtype: torch.dtype, reduce_dtype: torch.dtype) -> None:
    """Shard ``model`` over ``data_mesh``. ``param_dtype`` computes, ``reduce_dtype`` sums gradients."""
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    fp32 = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=data_mesh.device_type == "cuda") if config.enable_cpu_offload else OffloadPolicy()
    reshard = {"always": True, "never": False, "default": data_mesh.size() > 1}[config.fsdp_reshard_after_forward]
    if model.fsdp_units == "blocks":
        for module in list(fp32_modules(model)) if param_dtype != torch.float32 else ():
            # HeadParams returns its parameters themselves, which the block reads after the unit's forward.
            fully_shard(module, mesh=data_mesh, mp_policy=fp32, offload_policy=offload, reshard_after_forward=False)
        for block in model.blocks():
            fully_shard(block, mesh=data_mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
    fully_shard(model, mesh=data_mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum; a plain one serves, as nothing is divided.
            module.set_force_sum_reduction_for_comms(True)
    for method in METHODS_WITH_PARAMETERS:
        torch.distributed.fsdp.register_fsdp_forward_method(model, method)


def fp32_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules with parameters that components of ``model`` declare fp32, those of a ModuleList one by one."""
    for component in model.modules():
        if isinstance(component, DeclaresFp32):
            for name in sorted(component.fp32):
                child = component._modules.get(name)
                children = list(child) if isinstance(child, nn.ModuleList) else [child]
                yield from (m for m in children if m is not None and any(True for _ in m.parameters()))
