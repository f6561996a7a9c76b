"""The kernels that a GPU would use, as far as memory goes, in a trace whose fake tensors lie on the CPU.

A trace needs the autograd engine and FSDP2, which on "cuda" want a CUDA build and a device; so its tensors are on the CPU. Three
choices of the ops depend on the device, and are set here to those of a GPU for as long as the context lasts:

- attention: no mask of all pairs and no reference route for small sizes. What remains is one operator that keeps q, k, v, y
  and the log-sum-exp for the backward, which is what FlexAttention and cuDNN keep;
- the loss: as many logits a chunk as on a GPU;
- its products of bfloat16: float32 straight away, with no bfloat16 result in between.
"""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from titanarch.ops import biased_attention, cross_entropy


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The shape of ``a @ b`` in the dtype that a GPU gives it."""
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float64 if a.dtype == torch.float64 else torch.float32)


@contextmanager
def routes_of(device_type: str) -> Iterator[None]:
    """The ops behave as on ``device_type`` (cpu or cuda); fake tensors only."""
    if device_type == "cpu":
        yield
        return
    chunks: MutableMapping[str, int] = dict(cross_entropy._CHUNK_LOGITS)
    swaps: list[tuple[ModuleType, str, Any]] = [
        (biased_attention, "_SMALL_LOGITS", 0),
        (biased_attention, "_WHOLE_MASK", 0),
        (cross_entropy, "_CHUNK_LOGITS", {**chunks, "cpu": chunks["cuda"]}),
        (cross_entropy, "_product", _product),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in swaps]
    for module, name, value in swaps:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
