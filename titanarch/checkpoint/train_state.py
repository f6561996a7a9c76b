"""A model, its optimizers and the random generators as objects that a checkpoint can hold."""

import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from titanarch.checkpoint.errors import CheckpointError
from titanarch.checkpoint.processes import Processes

logger = logging.getLogger(__name__)

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")

# How a step is computed, not what it computes: a resumed run uses its own.
_IMPLEMENTATION_KEYS = ("foreach", "fused", "capturable", "differentiable")


class ModelState:
    """Parameters and persistent buffers by their plain names, whatever wraps the modules."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        state = get_model_state_dict(self.model, options=_OPTIONS)
        wrapped = [name for name in state if any(wrapper in name for wrapper in _WRAPPERS)]
        assert not wrapped, f"names must not tell how modules are wrapped: {wrapped}"
        return dict(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state_dict, options=_OPTIONS)


class OptimizerState:
    """The state of all optimizers of a model, by parameter name.

    One parameter belongs to one optimizer. The names are ``state.<parameter>.<buffer>`` and
    ``param_groups.<parameter>.<key>``, so the state loads however the parameters are grouped or sharded.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.model = model
        self.optimizers = tuple(optimizers)
        assert all(group["params"] for optimizer in self.optimizers for group in optimizer.param_groups), "a parameter group is empty"

    def state_dict(self) -> dict[str, Any]:
        fresh = [optimizer for optimizer in self.optimizers if not optimizer.state]
        state = get_optimizer_state_dict(self.model, self.optimizers, options=_OPTIONS)
        # torch allocates the state of a fresh optimizer by a step with zero gradients and rate; that must not count.
        counters = [buffers for optimizer in fresh for buffers in optimizer.state.values() if isinstance(buffers.get("step"), Tensor)]
        for buffers in counters:
            buffers["step"].zero_()
        return dict(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """CheckpointError where the parameter groups have other keys than those saved."""
        own = {name for name in self.state_dict() if name.startswith("param_groups.")}
        saved = {name for name in state_dict if name.startswith("param_groups.")}
        if own != saved:
            missing, extra = sorted(own - saved)[:5], sorted(saved - own)[:5]
            raise CheckpointError(f"the optimizers do not fit the checkpoint: missing there {missing}, only there {extra}")
        kept = [[{k: group[k] for k in _IMPLEMENTATION_KEYS if k in group} for group in o.param_groups] for o in self.optimizers]
        set_optimizer_state_dict(self.model, self.optimizers, state_dict, options=_OPTIONS)
        for optimizer, groups in zip(self.optimizers, kept, strict=True):
            for group, keys in zip(optimizer.param_groups, groups, strict=True):
                group.update(keys)


class RandomState:
    """The global generators of Python, numpy and torch of every process.

    They are restored where the run has as many processes as when it was saved; otherwise each process keeps the
    generators it was started with, and that is logged.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def state_dict(self) -> dict[str, Any]:
        """Collective: every process gets the state of all."""
        return {"processes": self.processes.merge({f"{self.processes.rank:06d}": _generators()})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved: Mapping[str, Any] = state_dict["processes"]
        if len(saved) != self.processes.count:
            if self.processes.rank == 0:
                logger.info(
                    "saved on %d processes, resumed on %d: the global random generators start anew", len(saved), self.processes.count
                )
            return
        _set_generators(saved[f"{self.processes.rank:06d}"])


def _generators() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - the global generator is what is saved
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys, dtype="<u4").tobytes(), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_available() else b"",
    }


def _set_generators(saved: Mapping[str, Any]) -> None:
    random.setstate(saved["python"])
    name, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((name, np.frombuffer(keys, dtype="<u4"), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(_bytes(saved["torch"]))
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(saved["cuda"]))


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
