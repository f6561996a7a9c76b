"""Activation checkpointing: what the backward recomputes rather than keeps (arXiv:1604.06174).

A block keeps its name and its hooks: only its ``forward`` is replaced, so neither parameter names nor FSDP see it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titanarch.contract.mixer import LocalMixer
from titanarch.contract.model import Model
from titanarch.parallel.config import ActivationCheckpointConfig

Forward = Callable[..., Any]

_KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_grouped_mm",
        "aten::_scaled_mm",
        "aten::_scaled_grouped_mm",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        # float8 scales: a pass over all of a tensor for one number.
        "aten::max",
        # Recomputing these would communicate again.
        "_c10d_functional::all_reduce",
        "_c10d_functional::all_gather_into_tensor",
        "_c10d_functional::reduce_scatter_tensor",
        "_c10d_functional::all_to_all_single",
    }
)
_KEPT_NAMESPACES = ("titanarch",)
"""Every operator of this project is a kernel that costs more than the memory of its result."""
_KEPT_HIGHER_ORDER = frozenset({"flex_attention", "inductor_compiled_code"})


def apply_activation_checkpoint(model: Model, config: ActivationCheckpointConfig) -> None:
    """Make the blocks of ``model`` recompute what ``config`` says. Before compile and FSDP.

    ``memory_budget`` is a setting of torch's partitioner, read when a block is compiled; it holds for the whole process.
    """
    budget = config.memory_budget if config.mode == "memory_budget" else 1.0
    torch._functorch.config.activation_memory_budget = budget
    selects_operators = config.mode == "selective" and config.selective_ac_option == "op"
    recompute = _recompute_some if selects_operators else _recompute_all
    for block in recomputed_blocks(model, config):
        block.forward = recompute(block.forward, preserve_rng_state=_draws_globally(block))


def recomputed_blocks(model: Model, config: ActivationCheckpointConfig) -> Iterator[nn.Module]:
    """The blocks whose forward is run again in the backward, be it in part."""
    if config.mode in ("full", "selective"):
        every = config.selective_ac_option if config.mode == "selective" and config.selective_ac_option != "op" else 1
        yield from (block for number, block in enumerate(model.blocks(), 1) if number % every == 0)


def kept_or_recomputed(_context: Any, operator: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    """The policy of ``selective_ac_option = "op"``; the signature is torch's."""
    namespace, name = operator.namespace, operator.name()
    if namespace == "higher_order":
        is_kept = name in _KEPT_HIGHER_ORDER
    else:
        is_kept = namespace in _KEPT_NAMESPACES or name.partition(".")[0] in _KEPT
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


# Two functions, because torch.compile must see at once whether there is a context_fn.


def _recompute_all(forward: Forward, *, preserve_rng_state: bool) -> Forward:
    def run(*arguments: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    return run


def _recompute_some(forward: Forward, *, preserve_rng_state: bool) -> Forward:
    contexts = partial(create_selective_checkpoint_contexts, kept_or_recomputed)

    def run(*arguments: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=preserve_rng_state, context_fn=contexts)

    return run


def _draws_globally(block: nn.Module) -> bool:
    """Whether a block may draw from torch's global generators: components draw by key, a LocalMixer may do anything."""
    return any(isinstance(module, LocalMixer) for module in block.modules())
