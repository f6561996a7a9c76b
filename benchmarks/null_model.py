"""A model of almost no cost, registered as ``null``: what a step takes with it is the trainer's own time.

Shapes: B rows, T tokens, D parameters, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.model import Model, ModelConfig, Objective, model
from titanarch.contract.sequence import SequenceInfo
from titanarch.data.batch import IGNORED

N_PARAMETERS = 8


class NullConfig(ModelConfig):
    """No keys."""


@model("null")
class Null(Model):
    """Reads no token: a target's loss is half the squared norm of the one parameter, and all logits are 0."""

    Config = NullConfig
    flavors = {}

    def __init__(self, config: NullConfig, vocab_size: int, seq_len: int) -> None:
        super().__init__(config, vocab_size, seq_len)
        self.vocab_size = vocab_size
        self.weight_D = nn.Parameter(torch.empty(N_PARAMETERS))

    @staticmethod
    def cost(config: NullConfig, vocab_size: int, seq_len: int) -> Cost:
        return Cost(parameters=N_PARAMETERS)

    def blocks(self) -> Iterator[nn.Module]:
        return iter(())

    def reset_parameters(self, init: Init) -> None:
        """N(0, 1)."""
        init.normal(self, "weight_D", 1.0)

    def forward(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor, z_weight: float = 0.0) -> Objective:
        total = self._loss() * labels_BT.numel()
        loss_sum = total.detach()
        return Objective(total, loss_sum, loss_sum, loss_sum, {})

    def token_losses(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor) -> Tensor:
        return self._loss() * (labels_BT != IGNORED)

    def logits(self, tokens_BT: Tensor, seq: SequenceInfo) -> Tensor:
        return self.weight_D.new_zeros(()).expand(*tokens_BT.shape, self.vocab_size)

    def _loss(self) -> Tensor:
        return 0.5 * torch.dot(self.weight_D, self.weight_D)
