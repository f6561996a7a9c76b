"""A divided model takes and returns whole rows: its tokens are divided on the way in, per-token results joined on the way out.

Shapes: B rows, T tokens of a row.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from titanarch.contract.model import Model, Objective
from titanarch.contract.sequence import SequenceInfo
from titanarch.ops.cross_entropy import IGNORED
from titanarch.parallel.collectives import gather_sequence
from titanarch.parallel.context_layout import ContextLayout
from titanarch.parallel.mesh import Mesh


class SequenceDivision:
    """The division of rows over the processes of context parallelism and, between mixers, of tensor parallelism.

    ``layout``: None where the sequence is not divided by context parallelism.
    """

    def __init__(self, mesh: Mesh, layout: ContextLayout | None, *, sequence_parallel: bool) -> None:
        self.layout = layout
        self.tensor_group = mesh.tensor_group if sequence_parallel and mesh.degrees.tp > 1 else None
        self.multiple = (layout.n_parts if layout else 1) * (self.tensor_group.size() if self.tensor_group else 1)

    def divide(self, tokens_BT: Tensor, seq: SequenceInfo) -> tuple[Tensor, SequenceInfo]:
        """This process's tokens; those of ``seq`` are the residual stream's, a part of them under sequence parallelism."""
        tokens_BT, seq = self._padded(tokens_BT, seq)
        if self.layout is not None:
            tokens_BT, seq = self.layout.own(tokens_BT, 1), self.layout.divide(seq)
        if self.tensor_group is not None:
            n, rank = self.tensor_group.size(), self.tensor_group.rank()
            seq = replace(seq.some(lambda x, dim: x.chunk(n, dim)[rank]), undivided=seq)
        return tokens_BT, seq

    def own(self, x_BT: Tensor, *, fill: int) -> Tensor:
        """This process's part of something of whole rows, padded with ``fill``."""
        x_BT = F.pad(x_BT, (0, -x_BT.shape[1] % self.multiple), value=fill)
        return x_BT if self.layout is None else self.layout.own(x_BT, 1)

    def join(self, x: Tensor, length: int) -> Tensor:
        """[B, T here, ...] of all processes to [B, length, ...]."""
        if self.layout is not None:
            x = self.layout.in_order(gather_sequence(x, self.layout.group))
        return x[:, :length]

    def _padded(self, tokens_BT: Tensor, seq: SequenceInfo) -> tuple[Tensor, SequenceInfo]:
        """Rows that divide: tokens after their end change nothing before it."""
        n = -seq.length % self.multiple
        if n == 0:
            return tokens_BT, seq
        longer = replace(
            seq,
            position_BT=torch.cat([seq.position_BT, seq.position_BT[:, -1:].expand(-1, n)], 1),
            document_BT=torch.cat([seq.document_BT, seq.document_BT[:, -1:].expand(-1, n)], 1),
            index_T=torch.arange(seq.length + n, device=seq.index_T.device),
            length=seq.length + n,
            cu_seqlens=None,
        )
        return F.pad(tokens_BT, (0, n)), longer


def divide_sequences(model: Model, division: SequenceDivision) -> None:
    """Make ``model`` divide the whole rows that it is given, which are alike on the processes that share them.

    The sums of an objective are then of this process's tokens, and add up over all processes; ``token_losses`` and
    ``logits`` give whole rows to every process. Decoding a token at a time is not divided.
    """
    forward, token_losses, logits = model.forward, model.token_losses, model.logits

    def divided_forward(tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor, z_weight: float = 0.0) -> Objective:
        labels_BT = division.own(labels_BT, fill=IGNORED)
        found = forward(*division.divide(tokens_BT, seq), labels_BT, z_weight)
        share = model.vocabulary.share
        return found._replace(loss_sum=found.loss_sum * share, z_sum=found.z_sum * share, n_targets=found.n_targets * share)

    def divided_token_losses(tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor) -> Tensor:
        own_labels_BT = division.own(labels_BT, fill=IGNORED)
        return division.join(token_losses(*division.divide(tokens_BT, seq), own_labels_BT), labels_BT.shape[1])

    def divided_logits(tokens_BT: Tensor, seq: SequenceInfo) -> Tensor:
        return division.join(logits(*division.divide(tokens_BT, seq)), tokens_BT.shape[1])

    model.forward, model.token_losses, model.logits = divided_forward, divided_token_losses, divided_logits  # type: ignore[method-assign]
