"""One cell of the parity matrix: three steps of the real code, with its losses and the gradients of its first step.

Runs on the processes of a team (``tests/parity/teams.py``), whose default process group is the world of the run.
"""

import gc
import importlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.parity.columns import Column, Compared
from tests.parity.rows import SEQ_LEN, Row
from titanarch.checkpoint.config import CheckpointConfig
from titanarch.checkpoint.store import Checkpointer
from titanarch.checkpoint.train_state import ModelState, OptimizerState
from titanarch.data.batch import IGNORED, Batch, Windows, make_batch
from titanarch.data.layout import RowLayout
from titanarch.parallel import fsdp, mesh
from titanarch.train import check, resolve, setup
from titanarch.train.gradients import GradientClipper, LossScaler
from titanarch.train.guard import BadGradientsConfig, GradientGuard
from titanarch.train.optimizers import build_optimizers
from titanarch.train.processes import Processes
from titanarch.train.run_config import RunConfig
from titanarch.train.step import TrainStep

N_ROWS, N_STEPS, SEED = 4, 3, 7
"""Rows of a step, steps of a run, its seed."""

RUN: dict[str, Any] = {
    "job": {"dump_folder": "nowhere"},
    "data": {"tokenizer": {"kind": "bytes"}},
    "training": {
        "seq_len": SEQ_LEN,
        "global_batch_size": N_ROWS,
        "steps": N_STEPS,
        "mixed_precision_param": "float32",
        "z_loss_weight": 1e-3,
    },
    "optimizer": {"name": "AdamW", "lr": 3e-3},
    "validation": {"enable": False},
    "evaluation": {"enable": False},
    "debug": {"seed": SEED},
}


@dataclass(frozen=True)
class Outcome:
    """``losses``: of each step, over all processes. ``gradients``: of the first, whole, by the names of the bare model."""

    losses: tuple[float, ...]
    gradients: dict[str, np.ndarray]


def configured(row: Row, column: Column, *, resumed: bool = False) -> RunConfig:
    """The configuration of a cell, with its seed filled in."""
    table: dict[str, Any] = {**RUN, "model": row.table}
    for key, value in {**row.keys, **(column.resumed_keys if resumed else column.keys)}.items():
        table = _with(table, key.split("."), value)
    return resolve.resolve(RunConfig.model_validate(table), seed=SEED, device_type="cpu")


def _with(table: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    inner = value if len(path) == 1 else _with(table.get(path[0], {}), path[1:], value)
    return {**table, path[0]: inner}


def run_trial(row: Row, column: Column, dtype: str) -> Outcome | None:
    """The outcome on process 0. ConfigError or ValidationError where the configuration is refused."""
    set_dtype(dtype)
    for module in row.imports:
        importlib.import_module(module)
    setup.build_mesh = cached_mesh
    if column.compiles:
        torch._dynamo.reset()
    run = Run(configured(row, column), alone=column.compared is Compared.ALONE)
    if column.compared is Compared.RESUMED:
        losses = run.train(1)
        run = run.moved_to(Run(configured(row, column, resumed=True), gradients=run.gradients))
        losses += run.train(N_STEPS - 1)
    else:
        losses = run.train(N_STEPS)
    outcome = Outcome(tuple(losses), {name: value.numpy() for name, value in run.gradients.items()})
    del run
    gc.collect()
    return outcome if dist.get_rank() == 0 else None


class Run:
    """A model, its optimizers and its rows, as the trainer puts them together.

    ``alone``: each document has a row of its own. ``gradients``: of the first step, filled by it.
    """

    def __init__(self, config: RunConfig, *, alone: bool = False, gradients: dict[str, Tensor] | None = None) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        check.check_run(config, world_size=world_size, device_type="cpu")
        processes = Processes(rank, world_size, torch.device("cpu"))
        self.vocab_size = int(getattr(config.model, "vocab_size", 0))
        built = setup.build_model(config, processes, self.vocab_size)
        self.alone, self.model, self.step_number = alone, built.model, 0
        parameters = dict(self.model.named_parameters())
        self.optimizers = build_optimizers(config.optimizer, list(parameters.items()), built.roles)
        self.gradients: dict[str, Tensor] = {} if gradients is None else gradients
        scaler = LossScaler(enabled=False)
        self.train_step = TrainStep(
            self.model,
            self.optimizers,
            clipper=RecordingClipper(parameters, config.training.max_norm, self.gradients),
            scaler=scaler,
            guard=GradientGuard(BadGradientsConfig(), scaler),
            mesh=built.mesh,
            device=processes.device,
            seed=SEED,
            z_weight=config.training.z_loss_weight,
        )
        n_shares = built.mesh.degrees.data_parallel
        self.layout = RowLayout(N_ROWS, resolve.local_batch_size(config, n_shares), built.mesh.data_rank, n_shares)

    def train(self, n_steps: int) -> list[float]:
        """The losses of so many steps more."""
        losses = []
        for _ in range(n_steps):
            batches = [
                rows_of(self.layout.first_row(self.step_number, m), self.layout.local_batch_size, self.vocab_size, alone=self.alone)
                for m in range(self.layout.accumulation_steps)
            ]
            self.step_number += 1
            loss = self.train_step(self.step_number, batches).loss.double()
            dist.all_reduce(loss)
            losses.append(loss.item())
        return losses

    def moved_to(self, other: "Run") -> "Run":
        """``other``, with what this one has learned, through a checkpoint."""
        with tempfile.TemporaryDirectory(prefix="parity-") as own:
            names = [own]  # that of process 0 serves all
            dist.broadcast_object_list(names)
            saver = Checkpointer(CheckpointConfig(async_mode="disabled"), Path(names[0]))
            saver.save(self.step_number, self._state(), config_text="")
            loaded = saver.load(other._state())
            saver.close()
            dist.barrier()
        assert loaded is not None, "the checkpoint just committed was not found"
        other.step_number = loaded.step
        return other

    def _state(self) -> dict[str, Any]:
        return {"model": ModelState(self.model), "optimizer": OptimizerState(self.model, self.optimizers.torch_optimizers)}


class RecordingClipper(GradientClipper):
    """Keeps the gradients of its first step in ``into``, as they are before clipping."""

    def __init__(self, parameters: dict[str, Tensor], max_norm: float, into: dict[str, Tensor]) -> None:
        super().__init__(parameters.values(), max_norm)
        self.named, self.into = parameters, into

    def clip(self, divide_by: float = 1.0) -> Tensor:
        if not self.into:
            for name, parameter in self.named.items():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self.into[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().clone()
        return super().clip(divide_by)


@cache
def cached_mesh(degrees: mesh.Degrees, device_type: str) -> mesh.Mesh:
    """A mesh of each layout, made once in the life of a team."""
    return mesh.Mesh(degrees, device_type)


def rows_of(first: int, n: int, vocab_size: int, *, alone: bool) -> Batch:
    """Rows ``first`` and on of the run: tokens, and documents that begin inside, drawn by the row's number."""
    windows, starts = [], []
    for number in range(first, first + n):
        generator = np.random.default_rng(number)
        windows.append(generator.integers(vocab_size, size=SEQ_LEN + 1))
        starts.append(sorted(generator.choice(np.arange(2, SEQ_LEN), size=number % 3, replace=False).tolist()))
    tokens_BS, row_B = np.stack(windows), np.arange(first, first + n)
    if alone:
        return _documents_alone(tokens_BS, starts, row_B)
    row_E = [row for row, columns in enumerate(starts) for _ in columns]
    column_E = [column for columns in starts for column in columns]
    return make_batch(Windows(tokens_BS, np.array(row_E, dtype=np.int64), np.array(column_E, dtype=np.int64), row_B))


def _documents_alone(tokens_BS: np.ndarray, starts: Sequence[Sequence[int]], row_B: np.ndarray) -> Batch:
    """Each part of a row as the beginning of a row of its own; what follows it has no target."""
    tokens, labels, numbers = [], [], []
    for row, columns in enumerate(starts):
        bounds = [0, *columns, SEQ_LEN]
        for start, end in pairwise(bounds):
            last = end + (end == SEQ_LEN)  # the last target of the row is that of its last document
            window = np.zeros(SEQ_LEN + 1, dtype=np.int64)
            window[: last - start] = tokens_BS[row, start:last]
            targets = np.full(SEQ_LEN, IGNORED)
            targets[: last - start - 1] = tokens_BS[row, start + 1 : last]
            tokens.append(window)
            labels.append(targets)
            numbers.append(row_B[row])
    none = np.empty(0, dtype=np.int64)
    batch = make_batch(Windows(np.stack(tokens), none, none, np.array(numbers)))
    batch.labels_BT.copy_(torch.from_numpy(np.stack(labels)))
    return batch


def set_dtype(dtype: str) -> None:
    """Compute and keep everything in float64 where that is asked for; a process stays with its choice."""
    if dtype == "float32":
        assert torch.get_default_dtype() is torch.float32, "a process serves one dtype"
        return
    torch.set_default_dtype(torch.float64)
    resolve.DTYPES["float32"] = torch.float64
    fsdp.fp32_modules = lambda block: iter(())
    meta = check.meta_model
    if meta.__name__ == "meta_model":
        double = lambda config, vocab_size: meta(config, vocab_size).double()  # noqa: E731
        check.meta_model = setup.meta_model = double
