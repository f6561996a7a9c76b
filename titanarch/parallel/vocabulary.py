"""Embedding, head and loss under tensor parallelism: divided by vocabulary, or by token.

Shapes: B rows, T tokens of the batch, S tokens of the residual stream (T, or T / degree under sequence parallelism), D model
dim, V vocabulary.
"""

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from titanarch.contract.layers import local
from titanarch.contract.vocabulary import Vocabulary
from titanarch.ops.cross_entropy import VocabularyShard
from titanarch.parallel.collectives import gather_sequence, scatter_sum_sequence, sum_gradients, sum_parts


class AlikeVocabulary(Vocabulary):
    """Every process has all rows and scores all tokens: no sequence parallelism, tables not divided."""

    def __init__(self, group: ProcessGroup) -> None:
        self.share = 1 / group.size()


class TokenDividedVocabulary(Vocabulary):
    """Every process has all rows, and embeds and scores its own tokens."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def own(self, x_BT: Tensor) -> Tensor:
        return x_BT.tensor_split(self.group.size(), dim=1)[self.group.rank()]

    def embed(self, tokens_BT: Tensor, weight_VD: Tensor) -> Tensor:
        return super().embed(self.own(tokens_BT), weight_VD)

    def scored(self, hidden_BSD: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_BSD, self.own(labels_BT)

    def rejoin(self, scored: Tensor) -> Tensor:
        return gather_sequence(scored, self.group)


class DividedVocabulary(Vocabulary):
    """Every process has an equal part of the rows, and scores all tokens by them (Megatron-LM, arXiv:1909.08053)."""

    def __init__(self, group: ProcessGroup, vocab_size: int, *, sequence_parallel: bool) -> None:
        assert vocab_size % group.size() == 0, "only an even vocabulary is divided"
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.n_rows = vocab_size // group.size()
        self.shard = VocabularyShard(self.n_rows * group.rank(), sum=self._sum, maximum=self._maximum)
        self.share = 1 / group.size()

    def embed(self, tokens_BT: Tensor, weight_VD: Tensor) -> Tensor:
        assert self.shard is not None
        row_BT = tokens_BT - self.shard.first
        elsewhere_BT = (row_BT < 0) | (row_BT >= self.n_rows)
        part_BTD = F.embedding(row_BT.masked_fill(elsewhere_BT, 0), local(weight_VD))
        part_BTD = part_BTD.masked_fill(elsewhere_BT[..., None], 0)
        return scatter_sum_sequence(part_BTD, self.group) if self.sequence_parallel else sum_parts(part_BTD, self.group)

    def scored(self, hidden_BSD: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        whole = gather_sequence(hidden_BSD, self.group) if self.sequence_parallel else sum_gradients(hidden_BSD, self.group)
        return whole, labels_BT

    def logits(self, hidden_BSD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        hidden_BTD, _ = self.scored(hidden_BSD, hidden_BSD)
        here = super().logits(hidden_BTD, weight_VD, bias_V)
        return gather_sequence(here.movedim(-1, 1), self.group).movedim(1, -1)

    def _sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def _maximum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x


def vocabulary_of(group: ProcessGroup, vocab_size: int, *, sequence_parallel: bool, loss_parallel: bool) -> Vocabulary:
    """How the vocabulary of a model is divided over ``group``: by row if wanted and even, else by token, else not at all."""
    if loss_parallel and vocab_size % group.size() == 0:
        return DividedVocabulary(group, vocab_size, sequence_parallel=sequence_parallel)
    return TokenDividedVocabulary(group) if sequence_parallel else AlikeVocabulary(group)


__all__ = ["AlikeVocabulary", "DividedVocabulary", "TokenDividedVocabulary", "vocabulary_of"]
