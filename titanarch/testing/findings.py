"""What a check says, and the measure by which two results are apart."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titanarch.contract.init import name_keyed_generator
from titanarch.testing.subject import N_HEADS, Subject, built, inputs, outcome, rows

Status = Literal["ok", "FAIL", "known", "-"]
"""FAIL: the contract is broken. known: it is, and the component's card says why. -: does not apply."""

EXACT, ROUNDED = 1e-10, 1e-6
"""Largest relative differences of results in fp64, and of a component that computes in fp32."""
LEAST_SHARE = 1e-3
"""A tensor's differences count against at least this share of the root mean square of all that are compared."""


@dataclass(frozen=True)
class Finding:
    """One line of a report. ``text``: the number that was found; where it failed, what was compared and what to do."""

    subject: str
    check: str
    status: Status
    text: str

    @property
    def passed(self) -> bool:
        return self.status != "FAIL"

    def __str__(self) -> str:
        return f"{self.status:5} {self.check}: {self.text}"


class Wrong(Exception):
    """A check found the contract broken; says what was compared, the number, and what to do."""


class Inapplicable(Exception):
    """A check says nothing of this component, and why."""


ROUNDINGS = 20
"""How many times what rounding moves the results of divided products may be off by: a few products follow each other."""

Check = Callable[[Subject], str]
"""Returns what it found. Raises Wrong, Inapplicable, or whatever the component raises."""


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference of a tensor, and its name; infinite where one is missing or not a number.

    A tensor counts against its own largest element, or, where that is much smaller, against what all have on average.
    """
    missing = sorted(found.keys() ^ expected.keys())
    if missing:
        return math.inf, f"{missing[0]}, which only one of them has"
    n = sum(value.numel() for value in expected.values())
    mean_square = sum(float(value.double().square().sum()) for value in expected.values()) / n
    floor = max(LEAST_SHARE * math.sqrt(mean_square), 1e-300)
    worst, where = 0.0, next(iter(expected))
    for name, value in expected.items():
        apart = float((found[name].double() - value.double()).abs().max()) / max(float(value.double().abs().max()), floor)
        if math.isnan(apart) or apart > worst:
            worst, where = (math.inf if math.isnan(apart) else apart), name
    return worst, where


class _LowPrecision(TorchDispatchMode):
    """Sees whether an operator gives a tensor of at least ``n`` elements in less than fp64."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64 and value.numel() >= self.n:
                self.seen = True
        return out


def tolerance(subject: Subject) -> float:
    """How far results in fp64 may be apart: EXACT, or ROUNDED where the component computes in fp32 all the same."""
    stack, (x, _) = built(subject), inputs()
    with torch.no_grad(), _LowPrecision(x.shape[0] * x.shape[1] * N_HEADS) as watch:
        stack(x, rows(stack))
    return ROUNDED if watch.seen else EXACT


def rounding(subject: Subject) -> float:
    """How far outputs and gradients in fp64 move where each weight moves by its last bits: products of other shapes do as much."""
    found = []
    for share in (0.0, torch.finfo(torch.float64).eps):
        stack, (x, weights) = built(subject), inputs()
        with torch.no_grad():
            for name, parameter in stack.named_parameters():
                parameter.mul_(1 + share * torch.randn(parameter.shape, generator=name_keyed_generator(3, name)).to(parameter.dtype))
        found.append(outcome(stack, x, rows(stack), weights))
    return difference(*found)[0]


def require_equal(
    subject: Subject, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, what: str, remedy: str, bound: float | None = None
) -> str:
    """``found`` and ``expected`` are alike to ``bound``, by default what the component's precision allows; says how far apart they are."""
    bound = tolerance(subject) if bound is None else bound
    worst, where = difference(found, expected)
    if worst > bound:
        raise Wrong(f"{subject.name}: {what} differ by {worst:.1e} in {where} ({bound:.0e} is allowed); {remedy}")
    return f"{what} differ by {worst:.1e} ({bound:.0e} is allowed)"


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
