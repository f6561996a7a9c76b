"""The mean of several models as a checkpoint of its own."""

from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import Tensor

from titanarch.checkpoint.loading import values_name
from titanarch.checkpoint.opened import OpenCheckpoint
from titanarch.checkpoint.processes import Processes
from titanarch.checkpoint.retention import Retention
from titanarch.checkpoint.saving import Commit, Uploaded, upload
from titanarch.checkpoint.storage import Storage
from titanarch.checkpoint.torch_io import alone
from titanarch.checkpoint.values import TreePath, encode
from titanarch.config.errors import ConfigError

_MODEL = "model"
_SHOWN = 10


def average(sources: Sequence[OpenCheckpoint], location: str) -> Uploaded:
    """Commit the means of the models of ``sources`` below ``location``, which does not exist yet.

    Each tensor is summed in float64 and kept in its own dtype; what is no float, and plain values, must be the same in all.
    The step is the largest of the sources' and the configuration is the first one's. Holds one model in memory.

    Raises:
        ConfigError: names, shapes, dtypes or what must be the same differ, or ``location`` exists.
        CheckpointError: it cannot be written.
    """
    assert len(sources) > 1, "a mean of one is that one"
    out = Storage(location)
    if out.exists():
        raise ConfigError(f"{location} exists already; remove it or choose another --out")
    problems = [problem for source in sources[1:] for problem in _problems(sources[0], source)]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ConfigError(f"these are not of one model: {'; '.join(problems[:_SHOWN])}{more}")
    tensors = {name: _mean(name, sources) for name in _tensors(sources[0])}
    values = {path[1:]: value for path, value in _values(sources[0]).items()}
    step = max(source.marker.step for source in sources)
    state, what = {**tensors, values_name(_MODEL): encode(values)}, Commit(step, sources[0].marker.config)
    try:
        with alone():
            return upload(out, Processes(timedelta(hours=1)), state, what=what, own_process=False, retention=Retention())
    except BaseException:
        out.remove_all()
        raise


def _tensors(source: OpenCheckpoint) -> list[str]:
    return [name for name in source.tensors if name.startswith(f"{_MODEL}.")]


def _values(source: OpenCheckpoint) -> dict[TreePath, object]:
    return {path: value for path, value in source.values().items() if path[0] == _MODEL}


def _problems(first: OpenCheckpoint, other: OpenCheckpoint) -> list[str]:
    """Why two checkpoints have no mean, as far as their indexes and plain values tell."""
    a, b = set(_tensors(first)), set(_tensors(other))
    problems = [] if a else [f"{first.path} holds no model"]
    problems += [f"{name} is only in {first.path}" for name in sorted(a - b)] + [
        f"{name} is only in {other.path}" for name in sorted(b - a)
    ]
    for name in sorted(a & b):
        ours, theirs = first.tensors[name], other.tensors[name]
        if ours.size != theirs.size:
            problems.append(f"{name} has shape {tuple(ours.size)} in {first.path} and {tuple(theirs.size)} in {other.path}")
        elif ours.properties.dtype != theirs.properties.dtype:
            problems.append(f"{name} is {ours.properties.dtype} in {first.path} and {theirs.properties.dtype} in {other.path}")
    if _values(first) != _values(other):
        problems.append(f"the plain values of the models of {first.path} and {other.path} differ")
    return problems


def _mean(name: str, sources: Sequence[OpenCheckpoint]) -> Tensor:
    """Of one tensor. ConfigError where it is no float and differs."""
    first = sources[0].read(name)
    if not first.is_floating_point():
        for source in sources[1:]:
            if not torch.equal(first, source.read(name)):
                raise ConfigError(f"{name} is {first.dtype}, of which there is no mean, and differs in {sources[0].path} and {source.path}")
        return first
    total = first.to(torch.float64)
    for source in sources[1:]:
        total += source.read(name)
    return (total / len(sources)).to(first.dtype)
