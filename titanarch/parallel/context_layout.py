"""Which tokens of a row each process holds under context parallelism.

A row is cut into equal parts. ``contiguous``: one part a process, in order. ``head_tail``: two, of the early half and of the
late half mirrored, so that causal attention costs every process the same (Llama 3, arXiv:2407.21783).

Shapes: B rows, T tokens of this process, N tokens of a whole row.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from titanarch.contract.sequence import Halo, LocalHalo, SequenceInfo
from titanarch.parallel.collectives import gather_sequence, gather_stacked


class ContextLayout:
    """The parts of ``group``'s rows. Part k is an early one or, head-tail, may be a late one."""

    def __init__(self, group: ProcessGroup, *, head_tail: bool) -> None:
        self.group = group
        self.head_tail = head_tail
        self.degree, self.rank = group.size(), group.rank()
        self.n_parts = self.degree * (2 if head_tail else 1)
        self.own_parts = self.parts_of(self.rank)
        by_rank = [part for rank in range(self.degree) for part in self.parts_of(rank)]
        self._parts_by_rank = by_rank
        self._place_of_part = [by_rank.index(k) for k in range(self.n_parts)]

    def parts_of(self, rank: int) -> tuple[int, ...]:
        """Numbers of the parts that a process holds, first one first."""
        return (rank, self.n_parts - 1 - rank) if self.head_tail else (rank,)

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This process's tokens of whole rows; ``dim`` counts tokens."""
        parts = x.chunk(self.n_parts, dim)
        return parts[self.own_parts[0]] if len(self.own_parts) == 1 else torch.cat([parts[k] for k in self.own_parts], dim)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts of this process's tokens, [B, T, ...]."""
        return x.chunk(len(self.own_parts), 1)

    def in_order(self, x: Tensor) -> Tensor:
        """Whole rows [B, N, ...] as the ranks hold them one after the other, to the order of the row."""
        return self._reordered(x, self._place_of_part)

    def by_rank(self, x: Tensor) -> Tensor:
        """The inverse of ``in_order``."""
        return self._reordered(x, self._parts_by_rank)

    def _reordered(self, x: Tensor, order: list[int]) -> Tensor:
        if not self.head_tail:
            return x
        parts = x.chunk(self.n_parts, 1)
        return torch.cat([parts[k] for k in order], 1)

    def divide(self, seq: SequenceInfo) -> SequenceInfo:
        """This process's part of ``seq``, whose rows are whole. ValueError where they cannot be divided."""
        if seq.length % self.n_parts:
            raise ValueError(f"{seq.length} tokens cannot be divided into {self.n_parts} parts")
        contiguous = seq.contiguous and not self.head_tail
        return replace(seq.some(self.own), contiguous=contiguous, halo=ContextHalo(self), undivided=seq)


def part_of(seq: SequenceInfo, number: int, n_parts: int) -> SequenceInfo:
    """Part ``number`` of the ``n_parts`` equal ones that ``seq`` is made of, each of consecutive tokens."""
    if n_parts == 1:
        return seq
    return replace(seq.some(lambda x, dim: x.chunk(n_parts, dim)[number]), contiguous=True)


class ContextHalo(Halo):
    """Brings the last tokens of the part before each part here, from an all-gather of all parts' tails.

    Tokens from further away than one part come from an all-gather of whole rows.
    """

    def __init__(self, layout: ContextLayout) -> None:
        self.layout = layout

    def shift(self, x: Tensor, n: int) -> Tensor:
        parts = self.layout.parts(x)
        if n > parts[0].shape[1]:
            whole = self.layout.in_order(gather_sequence(x, self.layout.group))
            return self.layout.own(LocalHalo().shift(whole, n), 1)
        tails = gather_stacked(torch.stack([part[:, part.shape[1] - n :] for part in parts]), self.layout.group)
        # The same graph on every process, or the backward's collectives would not pair up.
        tails = torch.cat([torch.zeros_like(tails[:1, 0]), tails.flatten(0, 1)])
        shifted = []
        for number, part in zip(self.layout.own_parts, parts, strict=True):
            before = tails[0 if number == 0 else 1 + self.layout._place_of_part[number - 1]]
            shifted += [before, part[:, : part.shape[1] - n]]
        return torch.cat(shifted, 1)
