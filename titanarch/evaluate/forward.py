"""How a model is run to be measured: without gradients, without dropout, in step with the other processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor on the device over the data-parallel processes, which all call it in the same order."""


def summed(x: Tensor, *, device: torch.device, reduce: Reduce) -> Tensor:
    """``x``, on the host, summed over the data-parallel processes by ``reduce``, which works on ``device``."""
    if device.type == "mps":  # has no fp64, and no process groups: a run there is one process
        return x
    return reduce(x.to(device)).cpu()


@dataclass(frozen=True)
class Ranks:
    """Which share of the rows this process evaluates: that of data-parallel rank ``rank`` of ``degree``."""

    rank: int
    degree: int
    reduce: Reduce


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, and every module in evaluation mode; the modes come back afterwards, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():  # FSDP2 cannot work on the tensors of inference mode
            yield
    finally:
        for module, training in modes:
            module.training = training
