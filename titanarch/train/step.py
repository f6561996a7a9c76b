"""One optimizer step: micro-batches forward and backward, clipping, the update.

The objective is the sum over valid targets divided by the number of valid targets of the whole global batch, plus the
weighted auxiliary terms, so that neither the layout nor the micro-batch size changes it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from titanarch.contract.model import Model, Objective
from titanarch.data.batch import Batch
from titanarch.evaluate.sequence import sequence_of
from titanarch.parallel.mesh import Mesh
from titanarch.train.gradients import GradientClipper, LossScaler
from titanarch.train.guard import GradientGuard
from titanarch.train.layer_norms import LayerNorms
from titanarch.train.update import Optimizers


@dataclass
class StepOutcome:
    """What a step leaves for the metrics: 0-d tensors that nothing writes to.

    ``loss``: this process's part of the mean cross-entropy. ``parts``: other parts that sum over processes.
    ``grad_norm``: before clipping, alike on all processes. ``is_made``: False where the update was skipped.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    grad_norm: Tensor
    is_made: bool


class TrainStep:
    """Calls make one step of ``model``; see the module."""

    def __init__(
        self,
        model: Model,
        optimizers: Optimizers,
        *,
        clipper: GradientClipper,
        scaler: LossScaler,
        guard: GradientGuard,
        mesh: Mesh,
        device: torch.device,
        seed: int,
        z_weight: float,
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.clipper = clipper
        self.layer_norms = LayerNorms(model, clipper)
        self.scaler = scaler
        self.guard = guard
        self.mesh = mesh
        self.device = device
        self.seed = seed
        self.z_weight = z_weight

    def __call__(self, step: int, batches: Sequence[Batch]) -> StepOutcome:
        """Step number ``step``, from 1, on this process's micro-batches, which lie on the host.

        Raises BadGradientError, before the update and with the gradients in place, where the guard stops the run.
        """
        loss, parts = self.backward(batches)
        norm = self.clipper.clip(divide_by=self.scaler.scale)
        self.layer_norms.add(step, self.scaler.scale)
        is_made = self.guard.admits(step, loss, norm)
        if is_made:
            self.optimizers.step()
            self.model.after_update()
        else:
            self.model.after_skip()
        self.optimizers.zero_grad()
        return StepOutcome(loss, parts, norm, is_made)

    def backward(self, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of a step, times the scaler's scale; this process's parts of the loss and of what else is logged."""
        n_targets = self._global_targets(batches)
        loss: Tensor | None = None
        parts: dict[str, Tensor] = {}
        for batch, objective in self._objectives(batches):
            share = objective.loss_sum / n_targets
            loss = share if loss is None else loss + share
            for name, part in self._metric_parts(objective, n_targets, len(batches)).items():
                parts[name] = parts[name] + part if name in parts else part
            differentiated = self._differentiated(objective, n_targets, len(batches))
            (differentiated if self.scaler.scale == 1.0 else differentiated * self.scaler.scale).backward()
            del batch
        assert loss is not None, "a step has at least one micro-batch"
        return loss, parts

    def _objectives(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Objective]]:
        """Each micro-batch's forward; gradients are summed over processes in the last one's backward."""
        accumulates = len(batches) > 1 and isinstance(self.model, FSDPModule)
        for number, batch in enumerate(batches):
            if accumulates:
                self.model.set_requires_gradient_sync(number == len(batches) - 1)  # type: ignore[operator]
            batch = batch.to(self.device, non_blocking=True)
            yield batch, self.model(batch.tokens_BT, sequence_of(batch, seed=self.seed), batch.labels_BT, self.z_weight)

    def _global_targets(self, batches: Sequence[Batch]) -> Tensor:
        """Valid targets of the global batch, an fp32 scalar on the device, at least 1; counted on the host."""
        here = sum(self.model.count_targets(batch.labels_BT, sequence_of(batch, seed=self.seed)) for batch in batches)
        if self.mesh.degrees.data_parallel == 1:
            return torch.tensor(float(max(here, 1))).to(self.device, non_blocking=True)
        count = torch.tensor(float(here), dtype=torch.float64).to(self.device, non_blocking=True)
        return self.mesh.sum_over_data(count).clamp_(min=1).float()

    def _differentiated(self, objective: Objective, n_targets: Tensor, n_batches: int) -> Tensor:
        loss, degrees = objective.total / n_targets, self.mesh.degrees
        for aux in objective.aux.values():
            if aux.weight:
                # Each micro-batch of each process counts alike: its own mean, divided by how many there are.
                loss = loss + aux.weight * aux.total / aux.counted / (n_batches * degrees.data_parallel * degrees.cp)
        return loss

    def _metric_parts(self, objective: Objective, n_targets: Tensor, n_batches: int) -> dict[str, Tensor]:
        parts = {
            name: (aux.total / aux.counted).detach() / (n_batches * self.mesh.degrees.world_size) for name, aux in objective.aux.items()
        }
        if self.z_weight:
            parts["z_loss"] = self.z_weight * objective.z_sum / n_targets
        return parts
