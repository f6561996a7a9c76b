"""The loss on fixed rows, in the training loop."""

from typing import NamedTuple

import torch

from titanarch.contract.model import Model
from titanarch.data.fixed import FixedBatches
from titanarch.evaluate.forward import Reduce, evaluating, summed
from titanarch.evaluate.sequence import sequence_of


class ValidationLoss(NamedTuple):
    """``loss``: mean nats a target; not a number where no row has a target. ``n_targets``: of all processes."""

    loss: float
    n_targets: int


def validation_loss(model: Model, batches: FixedBatches, *, device: torch.device, reduce: Reduce) -> ValidationLoss:
    """The mean cross-entropy over all valid targets of all processes, the same on each; nothing is drawn at random.

    Every process calls it with its own share of the same rows.
    """
    sums = torch.zeros(2, dtype=torch.float64)  # a sum of many fp32 losses in fp32 loses digits
    with evaluating(model):
        for batch in batches:
            moved = batch.to(device)
            losses_BT = model.token_losses(moved.tokens_BT, sequence_of(moved, seed=None), moved.labels_BT)
            sums[0] += losses_BT.cpu().double().sum()
            sums[1] += model.count_targets(batch.labels_BT, sequence_of(batch, seed=None))
    loss_sum, n_targets = summed(sums, device=device, reduce=reduce).tolist()
    return ValidationLoss(loss_sum / n_targets if n_targets else float("nan"), int(n_targets))
