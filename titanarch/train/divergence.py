"""Where two runs part: the first step whose logged losses differ, and the first module whose output does."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from titanarch.config.errors import ConfigError, Problem
from titanarch.train.metrics.rows import read_rows
from titanarch.train.processes import Processes
from titanarch.train.replay import Layout, Replayed, replay
from titanarch.train.run_folder import RunFolder

SAMPLED = 4096
"""Values kept of each tensor, evenly spread; its norm is compared too."""


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
class StepDifference:
    """Both runs at the step at which they part. ``rows_differ``: they read other tokens.

    ``parameters``: those that differ before the step; ``modules``: those whose output does, in forward order.
    """

    step: int
    losses: tuple[float, float]
    rows_differ: bool
    parameters: tuple[Difference, ...]
    n_parameters: int
    modules: tuple[Difference, ...]
    n_modules: int


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


class _Recorded:
    """A sample and the norm of everything that a replayed step computes."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[Tensor]] = {}
        self.parameters: dict[str, list[Tensor]] = {}

    def module(self, micro_batch: int, name: str, tensors: Sequence[Tensor]) -> None:
        self.outputs.setdefault(name if micro_batch == 0 else f"{name} (micro-batch {micro_batch})", []).extend(map(_sample, tensors))

    def parameter(self, name: str, tensor: Tensor) -> None:
        self.parameters[name] = [_sample(tensor)]


def step_difference(
    folders: tuple[Path, Path], parting: Parting, processes: Processes, *, layout: Layout, tolerance: float
) -> StepDifference:
    """Replay both runs to the step at which they part, which lies between two logged ones, and compare it. One process."""
    assert processes.world_size == 1, "the caller checks this"
    first = [replay(folder, parting.step, processes, layout=layout) for folder in folders]
    step = next((s for s in sorted(first[0].losses.keys() & first[1].losses.keys()) if _parted(first, s, tolerance)), parting.step)
    recorded = (_Recorded(), _Recorded())
    replayed = [
        replay(folder, step, processes, layout=layout, seen=record.module, parameters=record.parameter)
        for folder, record in zip(folders, recorded, strict=True)
    ]
    a, b = recorded
    return StepDifference(
        step=step,
        losses=(replayed[0].inspection.loss, replayed[1].inspection.loss),
        rows_differ=_tokens(replayed[0]) != _tokens(replayed[1]),
        parameters=_differences(a.parameters, b.parameters, tolerance),
        n_parameters=len(a.parameters),
        modules=_differences(a.outputs, b.outputs, tolerance),
        n_modules=len(a.outputs),
    )


def _parted(replayed: Sequence[Replayed], step: int, tolerance: float) -> bool:
    return differ(replayed[0].losses[step], replayed[1].losses[step], tolerance)


def _tokens(replayed: Replayed) -> list[list[list[int]]]:
    return [row for batch in replayed.batches for row in batch.tokens_BT.tolist()]


def _sample(tensor: Tensor) -> Tensor:
    """The norm and up to SAMPLED values, fp64 on the host."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, -(-flat.numel() // SAMPLED))].double().cpu()
    accumulated = torch.promote_types(flat.dtype, torch.float32)
    return torch.cat([torch.linalg.vector_norm(flat, dtype=accumulated).double().cpu()[None], sample])


def _differences(a: Mapping[str, Sequence[Tensor]], b: Mapping[str, Sequence[Tensor]], tolerance: float) -> tuple[Difference, ...]:
    """What differs by more than ``tolerance``, in the order of ``a``, then what only ``b`` has."""
    found = [Difference(name, _share(tensors, b.get(name))) for name, tensors in a.items()]
    found += [Difference(name, math.inf) for name in b if name not in a]
    return tuple(each for each in found if each.share > tolerance)


def _share(a: Sequence[Tensor], b: Sequence[Tensor] | None) -> float:
    if b is None or [t.shape for t in a] != [t.shape for t in b]:
        return math.inf
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if torch.equal(x.isfinite(), y.isfinite()):
            x, y = x[x.isfinite()], y[y.isfinite()]
            largest = float(torch.maximum(x.abs().amax(), y.abs().amax())) if x.numel() else 0.0
            worst = max(worst, float((x - y).abs().amax()) / largest if largest else 0.0)
        else:
            worst = math.inf
    return worst
