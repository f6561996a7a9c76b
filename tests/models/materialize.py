"""Build a component the way a run does: on the meta device, then memory, then initial weights."""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from titanarch.contract.init import Init, InitConfig, Scheme, qualified_names
from titanarch.contract.shape import ModelShape

M = TypeVar("M", bound=nn.Module)


def shape(d_model: int = 32, seq_len: int = 16, layers: tuple[str, ...] = ("attention", "attention")) -> ModelShape:
    return ModelShape(d_model=d_model, vocab_size=50, seq_len=seq_len, layers=layers)


def materialized(build: Callable[[], M], *, scheme: Scheme = "gpt2", seed: int = 0) -> M:
    """``build()`` on meta, then on the CPU with NaN wherever memory was not filled by ``reset_parameters``.

    Asserts that every parameter was filled, once each by name.
    """
    with torch.device("meta"):
        module = build()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(math.nan)
    init = Init(InitConfig(scheme=scheme), names=qualified_names(module), seed=seed, n_layers=2)
    reset = module.reset_parameters
    assert callable(reset)
    reset(init)
    assert init.filled == {name for name, _ in module.named_parameters()}
    assert all(p.isfinite().all() for p in module.parameters())
    return module


def n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
