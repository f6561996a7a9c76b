"""One training step of the real code as process 0 of many, on tensors without memory: what it keeps and what it sends.

A fake process group stands for the others (its collectives return at once), and fake tensors have shapes and no data. The
model is laid out by ``train.setup.lay_out`` and stepped by ``train.step.TrainStep``, as in a run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from titanarch.contract.model import Model
from titanarch.data.batch import Batch, Windows, make_batch
from titanarch.models.mixers.recurrent import KernelMixer
from titanarch.ops.recurrence_backend import REFERENCE
from titanarch.parallel.mesh import Mesh
from titanarch.plan.collectives import Group
from titanarch.plan.formulas import formula_bytes
from titanarch.plan.ledger import ACTIVATIONS, GATHERED, GRADIENTS, OPTIMIZER, OTHER, PARAMETERS, Ledger, Peak
from titanarch.plan.routes import routes_of
from titanarch.train.gradients import GradientClipper, LossScaler
from titanarch.train.guard import GradientGuard
from titanarch.train.optimizers import build_optimizers
from titanarch.train.resolve import local_batch_size
from titanarch.train.run_config import RunConfig
from titanarch.train.setup import LaidOut, lay_out
from titanarch.train.step import TrainStep
from titanarch.train.update import Optimizers

UPDATE = "update"
"""The scope of what a step sends once, whatever the number of micro-batches: counts of targets, norms, the optimizer."""
FIRST, LAST = "first micro-batch", "last micro-batch"


@dataclass(frozen=True)
class Traffic:
    """What a process sends over one axis of the mesh by one kind of collective: bytes and calls of an optimizer step."""

    axis: str
    kind: str
    sent_bytes: float
    calls: int


@dataclass(frozen=True)
class StepTrace:
    """``peak``: memory of process 0, steady state. ``rows`` of each of ``n_micro_batches`` of the step. ``state_bytes``: kept
    between steps. ``formulas``: closed formulas of the bytes sent, by axis. ``notes``: what was chosen."""

    peak: Peak
    traffic: tuple[Traffic, ...]
    n_micro_batches: int
    rows: int
    state_bytes: dict[str, int]
    formulas: dict[str, float | None]
    notes: tuple[str, ...]

    def sent_bytes(self, axis: str) -> float:
        return sum(t.sent_bytes for t in self.traffic if t.axis == axis)


@contextmanager
def fake_processes(world_size: int) -> Iterator[None]:
    """This process is rank 0 of ``world_size`` that do not exist."""
    assert not dist.is_initialized(), "a trace needs the default process group for itself"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def traceable(config: RunConfig) -> RunConfig:
    """``config`` without what only changes kernels: compilation, and overlapping collectives with products. Those of recurrences are taken
    out of the model.

    A memory budget is the compiler's, so its trace is that of ``none``: an upper bound.
    """
    parallelism = config.parallelism.model_copy(update={"enable_async_tensor_parallel": False})
    checkpoint = config.activation_checkpoint
    if checkpoint.mode == "memory_budget":
        checkpoint = checkpoint.model_copy(update={"mode": "none"})
    compiled = config.compile.model_copy(update={"enable": False})
    return config.model_copy(update={"compile": compiled, "parallelism": parallelism, "activation_checkpoint": checkpoint})


def trace_step(config: RunConfig, vocab_size: int, *, world_size: int, device_type: str) -> StepTrace:
    """Trace a step of a resolved ``config`` on ``world_size`` processes of ``device_type``."""
    config = traceable(config)
    with fake_processes(world_size), routes_of(device_type):
        built = lay_out(config, vocab_size, world_size=world_size, device_type="cpu")
        _without_kernels(built.model)
        return _traced(config, built)


def _without_kernels(model: Model) -> None:
    """Recurrences in plain PyTorch, whoever computes them in a run: kernels of CUDA cannot be traced here."""
    for module in model.modules():
        if isinstance(module, KernelMixer):
            module.config = module.config.model_copy(update={"backend": REFERENCE})


def _traced(config: RunConfig, built: LaidOut) -> StepTrace:
    n_data = built.mesh.degrees.data_parallel
    rows = local_batch_size(config, n_data)
    n_micro_batches = config.training.global_batch_size // (rows * n_data)
    batches = [synthetic_batch(rows, config.training.seq_len) for _ in range(min(n_micro_batches, 2))]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Ledger(fake=fake) as ledger:
        ledger.phase = "build"
        built.model.to_empty(device="cpu")
        optimizers = build_optimizers(config.optimizer, built.model.named_parameters(), built.roles, built.growth)
        _make_states(optimizers, ledger)
        step = _train_step(config, built, optimizers, ledger)
        _watch_micro_batches(built, ledger, len(batches))
        ledger.phase, ledger.scope = "step", UPDATE
        ledger.sent.clear()
        ledger.calls.clear()
        ledger.start_peak()
        step(1, batches)
        ledger.mark(built.model.parameters(), PARAMETERS)
        ledger.mark(_states(optimizers), OPTIMIZER)
    return StepTrace(
        peak=_with_inputs(ledger.peak(), batches[0]),
        traffic=tuple(traffic_of(ledger, built.mesh, n_micro_batches)),
        n_micro_batches=n_micro_batches,
        rows=rows,
        state_bytes=_state_bytes(built, optimizers),
        formulas=formula_bytes(config, built, rows=rows, n_micro_batches=n_micro_batches),
        notes=built.notes,
    )


def synthetic_batch(n_rows: int, length: int) -> Batch:
    """Rows of zeros, two documents in each, as packed rows have."""
    row = np.arange(n_rows, dtype=np.int64)
    tokens = np.zeros((n_rows, length + 1), dtype=np.int64)
    return make_batch(Windows(tokens, row, np.full(n_rows, max(length // 2, 1), dtype=np.int64), row))


class _TracedStep(TrainStep):
    def _global_targets(self, batches: Sequence[Batch]) -> Tensor:
        """Without counting, which reads the labels on the host; the same collective."""
        return self.mesh.sum_over_data(torch.ones((), dtype=torch.float64)).clamp_(min=1).float()


class _WatchedClipper(GradientClipper):
    """Says what gradients are once they are all there."""

    def __init__(self, ledger: Ledger, parameters: Iterator[Tensor], max_norm: float) -> None:
        super().__init__(parameters, max_norm)
        self.ledger = ledger

    def clip(self, divide_by: float = 1.0) -> Tensor:
        self.ledger.mark_survivors(GRADIENTS)
        self.ledger.scope, self.ledger.phase = UPDATE, "optimizer"
        return super().clip(divide_by)


def _train_step(config: RunConfig, built: LaidOut, optimizers: Optimizers, ledger: Ledger) -> TrainStep:
    scaler = LossScaler(enabled=config.training.mixed_precision_param == "float16")
    return _TracedStep(
        built.model,
        optimizers,
        clipper=_WatchedClipper(ledger, built.model.parameters(), config.training.max_norm),
        scaler=scaler,
        guard=GradientGuard(config.bad_gradients, scaler),
        mesh=built.mesh,
        device=torch.device("cpu"),
        seed=0,
        z_weight=config.training.z_loss_weight,
    )


def _make_states(optimizers: Optimizers, ledger: Ledger) -> None:
    """The first update makes the optimizer's states, which every later step finds there."""
    ledger.phase = "optimizer"
    parameters = [p for o in optimizers.torch_optimizers for group in o.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizers.step()
    optimizers.zero_grad()


def _states(optimizers: Optimizers) -> Iterator[Tensor]:
    for torch_optimizer in optimizers.torch_optimizers:
        for state in torch_optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _watch_micro_batches(built: LaidOut, ledger: Ledger, n_batches: int) -> None:
    """Count collectives by micro-batch; what one micro-batch leaves for the next is gradients.

    The loss makes those of the head in its forward.
    """
    number = 0

    def before_forward(*_: object) -> None:
        nonlocal number
        number += 1
        ledger.mark_survivors(GRADIENTS)
        ledger.scope = LAST if number == n_batches else FIRST

    built.model.register_forward_pre_hook(before_forward, prepend=True)


def _with_inputs(peak: Peak, batch: Batch) -> Peak:
    """The batch lies on the host while it is traced."""
    tensors = (batch.tokens_BT, batch.labels_BT, batch.position_BT, batch.document_BT, batch.row_B, batch.cu_seqlens)
    n_bytes = sum(t.numel() * t.element_size() for t in tensors)
    return Peak({**peak.by_category, OTHER: peak.by_category[OTHER] + n_bytes})


def _state_bytes(built: LaidOut, optimizers: Optimizers) -> dict[str, int]:
    """Of this process, whatever the moment."""

    def n_bytes(tensors: Iterator[Tensor]) -> int:
        local = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors]
        return sum(t.numel() * t.element_size() for t in local)

    parameters = n_bytes(iter(built.model.parameters()))
    return {PARAMETERS: parameters, GRADIENTS: parameters, OPTIMIZER: n_bytes(_states(optimizers))}


def axis_names(mesh: Mesh) -> Mapping[Group, str]:
    """The axis of each group of processes."""
    axes = {}
    for functional in (False, True):
        by_rows = {mesh.rows[axis].get_group().group_name: axis for axis in ("dp", "cp", "tp")}
        by_weights = {mesh.weights[axis].get_group().group_name: axis for axis in ("dp_replicate", "dp_shard_cp", "tp")}
        # Where groups are shared, what a function of tensors sends is the model's, and the rest is FSDP2's.
        names = {**by_weights, **by_rows} if functional else {**by_rows, **by_weights}
        axes.update({Group(name, functional): axis for name, axis in names.items()})
    return axes


def traffic_of(ledger: Ledger, mesh: Mesh, n_micro_batches: int) -> Iterator[Traffic]:
    """The traffic of a step: all its micro-batches but the last send what the first of them sends."""
    axes = axis_names(mesh)
    times = {FIRST: n_micro_batches - 1, LAST: 1, UPDATE: 1}
    total: dict[tuple[str, str], tuple[float, int]] = {}
    for (scope, group, kind), sent in ledger.sent.items():
        key, n_calls = (axes.get(group, "world"), kind), ledger.calls[scope, group, kind]
        before = total.get(key, (0.0, 0))
        total[key] = (before[0] + times[scope] * sent, before[1] + times[scope] * n_calls)
    for (axis, kind), (sent, n_calls) in sorted(total.items()):
        if sent:
            yield Traffic(axis, kind, sent, n_calls)


__all__ = ["ACTIVATIONS", "GATHERED", "StepTrace", "Traffic", "fake_processes", "trace_step", "traceable"]
