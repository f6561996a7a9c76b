"""Two checkpoints, tensor by tensor."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from titanarch.checkpoint.opened import OpenCheckpoint

_ELEMENTS_AT_ONCE = 2**20


@dataclass(frozen=True)
class TensorDifference:
    """Elements that differ, and the largest differences over all elements.

    ``relative`` to the larger of the two magnitudes. Two NaNs are equal; a NaN beside a number differs by infinity.
    """

    name: str
    n_elements: int
    n_differing: int
    absolute: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """What differs. ``other``: names, shapes, dtypes and plain values, a sentence each. ``tensors``: the largest difference first."""

    other: tuple[str, ...]
    tensors: tuple[TensorDifference, ...]
    n_identical: int

    @property
    def differs(self) -> bool:
        return bool(self.other or self.tensors)


def compare(first: OpenCheckpoint, second: OpenCheckpoint) -> Comparison:
    """All tensors that both have with one shape are compared in float64, one at a time; memory is that of the largest."""
    a, b = first.tensors, second.tensors
    other = [f"{name} is only in {side.path}" for side, extra in ((first, a.keys() - b), (second, b.keys() - a)) for name in sorted(extra)]
    differences, n_identical = [], 0
    for name in (name for name in a if name in b):
        if a[name].size != b[name].size:
            other.append(f"{name} has the shapes {tuple(a[name].size)} and {tuple(b[name].size)}")
            continue
        kinds = a[name].properties.dtype, b[name].properties.dtype
        if kinds[0] != kinds[1]:
            other.append(f"{name} has the dtypes {kinds[0]} and {kinds[1]}")
        difference = difference_of(name, first.read(name), second.read(name))
        if difference.n_differing:
            differences.append(difference)
        else:
            n_identical += 1
    differences.sort(key=lambda difference: (-difference.absolute, -difference.relative, difference.name))
    return Comparison((*other, *_values(first, second)), tuple(differences), n_identical)


def difference_of(name: str, first: Tensor, second: Tensor) -> TensorDifference:
    """Two tensors of one shape, a million elements at a time."""
    n_differing, absolute, relative = 0, 0.0, 0.0
    for x, y in zip(first.reshape(-1).split(_ELEMENTS_AT_ONCE), second.reshape(-1).split(_ELEMENTS_AT_ONCE), strict=True):
        wide = torch.complex128 if x.is_complex() or y.is_complex() else torch.float64
        p, q = x.to(wide), y.to(wide)
        # Large integers are equal in float64 before they are equal.
        differing = (x != y if x.dtype == y.dtype else p != q) & ~(p.isnan() & q.isnan())
        count = int(differing.sum())
        if count:
            p, q = p[differing], q[differing]
            gap = (p - q).abs().nan_to_num(nan=math.inf, posinf=math.inf)
            gap = gap if x.is_floating_point() or x.is_complex() else gap.clamp(min=1)
            share = (gap / torch.maximum(p.abs(), q.abs())).nan_to_num(nan=math.inf, posinf=math.inf)
            n_differing += count
            absolute, relative = max(absolute, float(gap.max())), max(relative, float(share.max()))
    return TensorDifference(name, first.numel(), n_differing, absolute, relative)


def _values(first: OpenCheckpoint, second: OpenCheckpoint) -> list[str]:
    a, b = ({".".join(path): value for path, value in side.values().items()} for side in (first, second))
    lines = [
        f"the value {name} is only in {side.path}"
        for side, extra in ((first, a.keys() - b), (second, b.keys() - a))
        for name in sorted(extra)
    ]
    return lines + [f"the value {name} is {_shown(a[name])} and {_shown(b[name])}" for name in sorted(a.keys() & b) if a[name] != b[name]]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
