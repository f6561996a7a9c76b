"""Where the rows of the embedding and the head are; parallel/ gives a model the divided forms.

Shapes: B rows, T tokens of the batch, S tokens of the residual stream (T, or a part), D model dim, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

from titanarch.contract.layers import local
from titanarch.ops.cross_entropy import VocabularyShard


class Vocabulary:
    """All rows and all tokens are here. Weights of the embedding and the head are read through this alone."""

    shard: VocabularyShard | None = None
    """Which rows the logits here belong to; None: all."""
    share: float = 1.0
    """What the sums of an objective count, so that those of all processes add up."""

    def embed(self, tokens_BT: Tensor, weight_VD: Tensor) -> Tensor:
        """Rows of the embedding for the residual stream, [B, S, D]."""
        return F.embedding(tokens_BT, local(weight_VD))

    def scored(self, hidden_BSD: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens whose logits are computed here: their hidden states and labels."""
        return hidden_BSD, labels_BT

    def rejoin(self, scored: Tensor) -> Tensor:
        """What was computed of the ``scored`` tokens, [B, S, ...], to that of all tokens of the batch, [B, T, ...]."""
        return scored

    def logits(self, hidden_BSD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        """Logits of all rows for the ``scored`` tokens, [B, S, V]."""
        return F.linear(hidden_BSD, local(weight_VD), None if bias_V is None else local(bias_V))
