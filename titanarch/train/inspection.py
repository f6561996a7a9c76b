"""A step's gradients once more, looked at module by module.

Random draws are keyed by row and position, so the same weights and rows give the same step: what is looked at is what
happened. Modules are named as the bare model names them. A module's outputs are looked at when its forward ends, so a part
comes before what holds it, and their gradients when backward has them.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from titanarch.checkpoint.processes import Processes
from titanarch.data.batch import Batch
from titanarch.train.gradients import GradientClipper
from titanarch.train.local_optimizers import shard_of
from titanarch.train.names import WRAPPERS, layer_of, plain_name
from titanarch.train.step import TrainStep

ROOT = "(the model)"


class Watcher(Protocol):
    """Takes what a step computes on this process, while it does."""

    def output(self, micro_batch: int, module: str, tensors: Sequence[Tensor]) -> None:
        """A module's floating-point outputs, local and without gradient; again where it is called again."""

    def gradient(self, micro_batch: int, module: str, index: int, tensor: Tensor) -> None:
        """The gradient of output number ``index`` of all that a module gave in the micro-batch."""

    def parameter_gradients(self, model: nn.Module) -> None:
        """Called once they are whole. Collective."""


@dataclass(frozen=True)
class Place:
    """A module in a micro-batch of a process; ``order``: how many modules came before it there."""

    micro_batch: int
    order: int
    module: str
    process: int


@dataclass(frozen=True)
class Inspection:
    """Of all processes. ``norms``: of the gradients before clipping, by layer.

    ``forward``, ``backward``: where first an output, or the gradient of one, was not finite; None where all were.
    ``parameters``: those whose gradient is not finite, in backward order.
    """

    loss: float
    norm: float
    norms: dict[str, float]
    forward: Place | None
    backward: Place | None
    parameters: tuple[str, ...]

    @property
    def first_backward(self) -> str | None:
        """The first module in backward order with a gradient that is not finite: of its output, or of its own parameter."""
        if self.backward is not None:
            return self.backward.module
        return (self.parameters[0].rpartition(".")[0] or ROOT) if self.parameters else None


def norms_by_layer(model: nn.Module, divide_by: float = 1.0) -> dict[str, float]:
    """The 2-norm of the gradients of each layer, over all processes; they are divided by ``divide_by`` in place."""
    layers: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        layers.setdefault(layer_of(name), []).append(parameter)
    return {layer: GradientClipper(parameters, math.inf).clip(divide_by).item() for layer, parameters in layers.items()}


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


class _Probe:
    """Hooks on every module of ``model``, in place while the context is entered. What activations are recomputed for is left out."""

    def __init__(self, model: nn.Module, watchers: Sequence[Watcher]) -> None:
        self._model, self._watchers = model, watchers
        self._micro_batch = -1
        self._n_outputs: Counter[str] = Counter()
        """Of each module in this micro-batch so far."""
        self._is_forward = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = [self._model.register_forward_pre_hook(self._begin, prepend=True)]
        for name, module in self._model.named_modules():
            if name.rpartition(".")[2] not in WRAPPERS:
                handles.append(module.register_forward_hook(self._hook(plain_name(name) or ROOT, is_root=module is self._model)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, *_: object) -> None:
        self._micro_batch += 1
        self._n_outputs.clear()
        self._is_forward = True

    def _hook(self, name: str, *, is_root: bool) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not self._is_forward:
                return
            found = list(tensors_of(output))
            for watcher in self._watchers:
                watcher.output(self._micro_batch, name, [shard_of(tensor.detach()) for tensor in found])
            for index, tensor in enumerate(found, self._n_outputs[name]):
                if tensor.requires_grad:
                    tensor.register_hook(self._gradient_hook(self._micro_batch, name, index))
            self._n_outputs[name] += len(found)
            if is_root:
                self._is_forward = False

        return hook

    def _gradient_hook(self, micro_batch: int, name: str, index: int) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            for watcher in self._watchers:
                watcher.gradient(micro_batch, name, index, shard_of(grad.detach()))

        return hook


class _FirstBad:
    """Remembers the first tensors that are not finite, of outputs and of gradients, and when backward came to each module last."""

    def __init__(self, process: int) -> None:
        self.forward: Place | None = None
        self.backward: Place | None = None
        self.order: dict[str, int] = {}
        self._process = process
        self._n_outputs, self._n_gradients = 0, 0

    def output(self, micro_batch: int, module: str, tensors: Sequence[Tensor]) -> None:
        self.forward = self.forward or self._bad(Place(micro_batch, self._n_outputs, module, self._process), tensors)
        self._n_outputs += 1

    def gradient(self, micro_batch: int, module: str, _index: int, tensor: Tensor) -> None:
        self.order[module] = self._n_gradients
        self.backward = self.backward or self._bad(Place(micro_batch, self._n_gradients, module, self._process), [tensor])
        self._n_gradients += 1

    def parameter_gradients(self, model: nn.Module) -> None:
        return

    @staticmethod
    def _bad(place: Place, tensors: Sequence[Tensor]) -> Place | None:
        return None if all(bool(tensor.isfinite().all()) for tensor in tensors) else place


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Run the step's forwards as before, outside of compiled graphs, and leave no trace: buffers and generators are put back."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


def inspect(train_step: TrainStep, batches: Sequence[Batch], processes: Processes, watcher: Watcher | None = None) -> Inspection:
    """Compute the gradients of ``batches`` again, and drop them. Collective. ``watcher``: looks on."""
    model, bad = train_step.model, _FirstBad(processes.rank)
    watchers: list[Watcher] = [bad] if watcher is None else [bad, watcher]
    train_step.optimizers.zero_grad()
    with unchanged(model), _Probe(model, watchers).attached():
        loss, _ = train_step.backward(batches)
    norms = norms_by_layer(model, train_step.scaler.scale)
    for each in watchers:
        each.parameter_gradients(model)
    parameters = _not_finite(model, bad.order)
    train_step.optimizers.zero_grad()
    found = processes.gather((loss.item(), bad.forward, bad.backward, parameters))
    return Inspection(
        loss=sum(each[0] for each in found),
        norm=math.sqrt(sum(norm * norm for norm in norms.values())),
        norms=norms,
        forward=_first(each[1] for each in found),
        backward=_first(each[2] for each in found),
        parameters=tuple(name for name, _ in sorted({key: order for each in found for key, order in each[3].items()}.items(), key=_order)),
    )


def _not_finite(model: nn.Module, order: Mapping[str, int]) -> dict[str, int]:
    """The parameters whose gradient here is not finite, and when backward came to their module; the last where it is not known."""
    bad: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(shard_of(parameter.grad).isfinite().all()):
            plain = plain_name(name)
            bad[plain] = order.get(plain.rpartition(".")[0] or ROOT, len(order) + len(bad))
    return bad


def _first(places: Iterator[Place | None]) -> Place | None:
    return min((place for place in places if place is not None), key=lambda place: (place.micro_batch, place.order), default=None)


def _order(item: tuple[str, int]) -> int:
    return item[1]
