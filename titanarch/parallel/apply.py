"""From a model on the meta device to one laid out over processes, with the weights that its seed gives."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from titanarch.contract.growth import Growth
from titanarch.contract.init import Init, InitConfig, qualified_names
from titanarch.contract.mixer import BaseMixer, SequenceMixer
from titanarch.contract.model import Model
from titanarch.parallel.activation_checkpoint import apply_activation_checkpoint
from titanarch.parallel.check import Division
from titanarch.parallel.compile import apply_compile, gather_before_graphs, overlap_tensor_parallelism
from titanarch.parallel.config import ActivationCheckpointConfig, CompileConfig, Float8Config, ParallelismConfig
from titanarch.parallel.context_layout import ContextLayout
from titanarch.parallel.context_parallel import apply_context_parallel
from titanarch.parallel.float8 import apply_float8, precompute_scales
from titanarch.parallel.fsdp import apply_fsdp
from titanarch.parallel.mesh import Mesh
from titanarch.parallel.sequence_division import SequenceDivision, divide_sequences
from titanarch.parallel.tensor_parallel import divide_model
from titanarch.parallel.token_counts import sum_token_counts


def parallelize(
    model: Model,
    mesh: Mesh,
    division: Division,
    *,
    vocab_size: int,
    parallelism: ParallelismConfig,
    activation_checkpoint: ActivationCheckpointConfig,
    compile_config: CompileConfig,
    float8: Float8Config | None = None,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> None:
    """Apply, in this order: float8, context and tensor parallelism, activation checkpointing, compile a block, FSDP2.

    ``model`` is on the meta device; ``division`` is what ``decide_division`` said of it. ``float8``: None is off.
    """
    degrees, layout = mesh.degrees, None
    if float8 is not None and float8.enable:
        apply_float8(model, float8, mesh.fsdp.device_type)
    if degrees.cp > 1:
        layout = ContextLayout(mesh.context_group, head_tail=division.head_tail)
        mixers = [module for module in model.modules() if isinstance(module, BaseMixer)]
        for mixer, method in zip(mixers, division.methods, strict=True):
            assert isinstance(mixer, SequenceMixer), "decide_division checks this"
            assert method is not None, "decide_division checks this"
            apply_context_parallel(mixer, layout, method)
    if degrees.tp > 1:
        divide_model(
            model,
            mesh.tensor,
            vocab_size,
            sequence_parallel=parallelism.enable_sequence_parallel,
            loss_parallel=parallelism.enable_loss_parallel,
        )
    sum_token_counts(model, mesh)
    model.sum_over_rows = mesh.sum_over_data
    apply_activation_checkpoint(model, activation_checkpoint)
    if compile_config.enable:
        apply_compile(model, compile_config)
    if parallelism.enable_async_tensor_parallel:
        overlap_tensor_parallelism(mesh.tensor_group)
    apply_fsdp(model, mesh.fsdp, parallelism, param_dtype, reduce_dtype)
    if compile_config.enable:
        gather_before_graphs(model)
    if float8 is not None and float8.enable and float8.enable_fsdp_float8_all_gather and float8.precompute_float8_dynamic_scale_for_fsdp:
        precompute_scales(model, float8, mesh.weights["dp_shard_cp"].get_group())
    if degrees.cp > 1 or degrees.tp > 1:
        divide_sequences(model, SequenceDivision(mesh, layout, sequence_parallel=parallelism.enable_sequence_parallel))


def materialize(
    model: Model,
    names: dict[nn.Module, str],
    config: InitConfig,
    *,
    seed: int,
    device: torch.device,
    growth: Mapping[str, Growth] | None = None,
) -> None:
    """Allocate ``model`` on ``device`` and draw its weights by name.

    ``names``: from ``qualified_names`` of the bare model, before ``parallelize``. ``growth``: see contract.width.
    """
    model.to_empty(device=device)
    init = Init(config, names=names, seed=seed, n_layers=sum(1 for _ in model.blocks()), growth=growth)
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
