"""From a model on the meta device to one laid out over processes, with the weights that its seed gives."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh

from titanarch.contract.init import Init, InitConfig, qualified_names
from titanarch.contract.model import Model
from titanarch.parallel.config import ActivationCheckpointConfig, CompileConfig, ParallelismConfig
from titanarch.parallel.fsdp import apply_fsdp


def parallelize(
    model: Model,
    mesh: DeviceMesh,
    *,
    parallelism: ParallelismConfig,
    activation_checkpoint: ActivationCheckpointConfig,
    compile_config: CompileConfig,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> None:
    """Apply, in this order: activation checkpointing, compile a block, FSDP2. ``model`` is on the meta device."""
    if activation_checkpoint.mode == "full":
        wrap_blocks(model)
    if compile_config.enable:
        for block in model.blocks():
            block.compile(fullgraph=True, dynamic=False)
    apply_fsdp(model, mesh, parallelism, param_dtype, reduce_dtype)


def wrap_blocks(model: Model) -> None:
    """Checkpoint each block: only its input is kept for the backward."""
    blocks = set(model.blocks())
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in blocks:
                setattr(parent, name, checkpoint_wrapper(child, preserve_rng_state=False))


def materialize(model: Model, names: dict[nn.Module, str], config: InitConfig, *, seed: int, device: torch.device) -> None:
    """Allocate ``model`` on ``device`` and draw its weights by name.

    ``names``: from ``qualified_names`` of the bare model, before ``parallelize``.
    """
    model.to_empty(device=device)
    init = Init(config, names=names, seed=seed, n_layers=sum(1 for _ in model.blocks()))
    model.reset_parameters(init)
    forgotten = parameter_names(model.modules(), names) - init.filled
    assert not forgotten, f"reset_parameters of {type(model).__qualname__} left out {sorted(forgotten)}"


def parameter_names(modules: Iterable[nn.Module], names: dict[nn.Module, str]) -> set[str]:
    """Qualified names, of the bare model, of all parameters."""
    return {
        f"{names[module]}.{name}" if names[module] else name
        for module in modules
        if module in names
        for name, _ in module.named_parameters(recurse=False)
    }


__all__ = ["materialize", "parallelize", "qualified_names"]
