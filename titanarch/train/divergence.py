"""Where two runs part: the first step whose logged losses differ, and the first module whose output does."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from titanarch.config.errors import ConfigError, Problem
from titanarch.train.inspection import ROOT
from titanarch.train.metrics.rows import read_rows
from titanarch.train.recording import Recording, Whole
from titanarch.train.run_config import DType
from titanarch.train.run_folder import RunFolder

ROUNDING: Mapping[DType, float] = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}
"""What the order of sums, which is another on another layout, may change a loss by, as a share of it."""
TENSOR_ROUNDING = 10.0
"""How many times as much it may change a value of a tensor, as a share of the largest."""
SMALL_GRADIENT = 1e-2
"""Gradients are compared as shares of this times the root mean square of all if that is more: some are zero but for rounding."""

SCALAR = 2
"""Numbers in the sample of a tensor of one value: its norm, and itself."""

Record = Callable[[Path, int], Recording]
"""Replays a step of a run."""


class Tolerance(NamedTuple):
    """Differences that count as none: of a loss as a share of it, of the values of a tensor as a share of its largest."""

    loss: float
    tensor: float

    @classmethod
    def of_rounding(cls, dtypes: Iterable[DType]) -> "Tolerance":
        """What another layout may change where products are computed in ``dtypes``."""
        loss = max(ROUNDING[dtype] for dtype in dtypes)
        return cls(loss, TENSOR_ROUNDING * loss)


@dataclass(frozen=True)
class Parting:
    """The losses of both runs at ``step``; ``agreed``: the last step before whose logged losses agree, 0 where there is none."""

    step: int
    agreed: int
    losses: tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """The largest difference of a tensor in both runs, as a share of its largest value; inf where one has none or another shape."""

    name: str
    share: float


@dataclass(frozen=True)
class Compared:
    """What differs of ``n`` things, in their order; ``n_left_out`` more lie otherwise on other processes and were not compared."""

    differences: tuple[Difference, ...]
    n: int
    n_left_out: int = 0


@dataclass(frozen=True)
class StepDifference:
    """Both runs at the step at which they part. ``rows_differ``: they read other tokens.

    ``parameters``: before the step. ``modules``: their outputs, in forward order. ``gradients``: of these, in backward order.
    ``parameter_gradients``: of the whole step.
    """

    step: int
    losses: tuple[float, float]
    rows_differ: bool
    parameters: Compared
    modules: Compared
    gradients: Compared
    parameter_gradients: Compared


def logged_losses(folder: Path) -> dict[int, float]:
    """The training losses of a run, by step. ConfigError where it has logged nothing."""
    path = RunFolder(folder).metrics_path
    if not path.is_file():
        raise ConfigError(Problem(f"{folder} holds no {path.name}, so it is no run that logged anything"))
    return {int(row["step"]): float(row["loss"]) for row in read_rows(path) if "loss" in row}


def differ(a: float, b: float, tolerance: float) -> bool:
    """Whether ``a`` and ``b`` differ by more than ``tolerance``, as a share of the larger; two that are no numbers do not."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) != math.isnan(b)
    return a != b and not abs(a - b) <= tolerance * max(abs(a), abs(b))


def parting(a: Mapping[int, float], b: Mapping[int, float], tolerance: float) -> Parting | None:
    """The first step that both have, and at which the losses differ."""
    agreed = 0
    for step in sorted(a.keys() & b.keys()):
        if differ(a[step], b[step], tolerance):
            return Parting(step, agreed, (a[step], b[step]))
        agreed = step
    return None


def step_difference(folders: tuple[Path, Path], parting: Parting, record: Record, tolerance: Tolerance) -> StepDifference:
    """Replay both runs to the step at which they part, which lies between two logged ones, and compare it."""
    a, b = (record(folder, parting.step) for folder in folders)
    step = next((s for s in sorted(a.losses.keys() & b.losses.keys()) if differ(a.losses[s], b.losses[s], tolerance.loss)), parting.step)
    if step != parting.step:
        a, b = (record(folder, step) for folder in folders)
    return compared(step, a, b, tolerance.tensor)


def compared(step: int, a: Recording, b: Recording, tolerance: float) -> StepDifference:
    """One step of two runs. Tensors differ where they do by more than ``tolerance``, as a share of the largest value."""
    same_layout = a.degrees == b.degrees
    floor = SMALL_GRADIENT * max(_root_mean_square(side.parameter_gradients.values()) for side in (a, b))
    output_floor = SMALL_GRADIENT * max(_root_mean_square(_values(side.output_gradients)) for side in (a, b))
    return StepDifference(
        step=step,
        losses=(a.losses[step], b.losses[step]),
        rows_differ=a.tokens != b.tokens,
        parameters=_samples(a.parameters, b.parameters, tolerance),
        modules=_modules(a.outputs, b.outputs, tolerance, same_layout=same_layout),
        gradients=_modules(a.output_gradients, b.output_gradients, tolerance, same_layout=same_layout, floor=output_floor),
        parameter_gradients=_samples(a.parameter_gradients, b.parameter_gradients, tolerance, floor=floor),
    )


def _samples(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float, *, floor: float = 0.0) -> Compared:
    """What differs, in the order of ``a``, then what only ``b`` has."""
    shares = {name: _sample_share(x, b.get(name), floor) for name, x in a.items()} | {name: math.inf for name in b if name not in a}
    return Compared(tuple(Difference(name, share) for name, share in shares.items() if share > tolerance), len(a))


def _modules(
    a: Mapping[str, list[Whole]], b: Mapping[str, list[Whole]], tolerance: float, *, same_layout: bool, floor: float = 0.0
) -> Compared:
    """The same of modules with several outputs. Sums of a process and the like are compared on the same layout alone."""
    shares: dict[str, float] = {}
    n_left_out = 0
    for name in [*a, *(name for name in b if name not in a)]:
        if name == ROOT and not same_layout:
            n_left_out += 1
            continue
        if name not in a or name not in b or len(a[name]) != len(b[name]):
            shares[name] = math.inf
            continue
        found = [_whole_share(x, y, floor, same_layout=same_layout) for x, y in zip(a[name], b[name], strict=True)]
        known = [share for share in found if share is not None]
        if found and not known:
            n_left_out += 1
        else:
            shares[name] = max(known, default=0.0)
    return Compared(tuple(Difference(name, share) for name, share in shares.items() if share > tolerance), len(shares), n_left_out)


def _whole_share(a: Whole, b: Whole, floor: float, *, same_layout: bool) -> float | None:
    """None where the two cannot be compared."""
    if a.values is not None and b.values is not None:
        known = not math.isnan(a.norm) and not math.isnan(b.norm)
        of_norm = _share(torch.tensor([a.norm]), torch.tensor([b.norm]), floor) if known else 0.0
        return max(_share(a.values, b.values, floor), of_norm)
    if same_layout:
        pairs = zip(a.pieces, b.pieces, strict=True) if len(a.pieces) == len(b.pieces) else ()
        return max((_sample_share(x, y, floor) for x, y in pairs), default=math.inf)
    if a.only_piece is None or b.only_piece is None or len(a.only_piece) <= SCALAR:
        return None
    return _sample_share(a.only_piece, b.only_piece, floor)


def _sample_share(a: Tensor, b: Tensor | None, floor: float) -> float:
    """Of a norm and the values after it."""
    return math.inf if b is None or a.shape != b.shape else max(_share(a[:1], b[:1], floor), _share(a[1:], b[1:], floor))


def _share(a: Tensor, b: Tensor, floor: float) -> float:
    """The largest difference as a share of the largest value, or of ``floor``."""
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    x, y = a[a.isfinite()].double(), b[b.isfinite()].double()
    largest = max(float(torch.maximum(x.abs().amax(), y.abs().amax())), floor) if x.numel() else 0.0
    return float((x - y).abs().amax()) / largest if largest else 0.0


def _values(outputs: Mapping[str, list[Whole]]) -> Iterator[Tensor]:
    return (whole.values.double() for each in outputs.values() for whole in each if whole.values is not None)


def _root_mean_square(tensors: Iterable[Tensor]) -> float:
    """Over the finite values of all."""
    total, n = 0.0, 0
    for tensor in tensors:
        finite = tensor[tensor.isfinite()]
        total, n = total + float(finite.square().sum()), n + finite.numel()
    return math.sqrt(total / n) if n else 0.0
