"""What a component may know of its tokens.

Shapes: B rows, T tokens on this process, N tokens of a whole row.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


class Halo(ABC):
    """Brings tokens that precede the ones on this process; parallel/ injects the form that communicates."""

    @abstractmethod
    def shift(self, x: Tensor, n: int) -> Tensor:
        """The tokens ``n`` earlier in the row, [B, T, ...] like ``x``; anything where the row has none."""


class LocalHalo(Halo):
    """Every row is whole on this process."""

    def shift(self, x: Tensor, n: int) -> Tensor:
        return torch.cat([torch.zeros_like(x[:, :n]), x[:, : max(x.shape[1] - n, 0)]], dim=1)


class StepHalo(Halo):
    """Decoding a token at a time: ``x`` is one token, and what came before it was given to ``shift`` in earlier steps.

    The calls of a step come in the same order every time, so each finds its own past by number. ``past``: what the step before
    left in ``kept``; empty before the first token.
    """

    def __init__(self, past: Mapping[str, Tensor]) -> None:
        self.past = past
        self.kept: dict[str, Tensor] = {}

    def shift(self, x: Tensor, n: int) -> Tensor:
        name = f"halo.{len(self.kept)}"
        past = self.past[name] if name in self.past else torch.zeros_like(x).repeat_interleave(n, dim=1)
        self.kept[name] = torch.cat([past[:, 1:], x], dim=1)
        return past[:, :1]


@dataclass(frozen=True)
class SequenceInfo:
    """The tokens of a batch on this process.

    ``position_BT``: index of each token inside its document. ``document_BT``: number of its document in the row.
    ``index_T``: index of each token in its row, the same for all rows; under context parallelism the tokens here
    are not the first ones, so an ``arange(T)`` in a component is a bug. ``row_B``: number of each row in the run,
    which keys random draws. ``length``: tokens of a whole row. ``seed``: the run's, or None where nothing is drawn
    (evaluation, generation). ``packed``: False promises that every row is one document. ``contiguous``: whether
    ``index_T`` counts up by one. ``cu_seqlens``: starts of the documents in the flattened batch, int32, padded to a
    fixed length with the number of tokens. ``undivided``:
    the same batch before its tokens were divided the last time, where they were.
    """

    position_BT: Tensor
    document_BT: Tensor
    index_T: Tensor
    row_B: Tensor
    length: int
    seed: int | None
    packed: bool = True
    contiguous: bool = True
    cu_seqlens: Tensor | None = None
    halo: Halo = field(default_factory=LocalHalo)
    undivided: "SequenceInfo | None" = None

    @property
    def starts_BT(self) -> Tensor | None:
        """[B, T], True where a document starts; None where every row is one document, before which there is nothing to forget."""
        return self.position_BT == 0 if self.packed else None

    def previous(self, x: Tensor, n: int) -> Tensor:
        """The tokens ``n`` earlier in the same document, [B, T, ...] like ``x``; zero where the document has none."""
        if n == 0:
            return x
        shifted = self.halo.shift(x, n)
        outside = (self.position_BT < n).reshape(*self.position_BT.shape, *[1] * (x.dim() - 2))
        return shifted.masked_fill(outside, 0)

    def some(self, pick: Callable[[Tensor, int], Tensor]) -> "SequenceInfo":
        """Some of the tokens here: ``pick(x, dim)`` takes theirs along the dimension of ``x`` that counts tokens."""
        position_BT, document_BT = pick(self.position_BT, 1), pick(self.document_BT, 1)
        return replace(self, position_BT=position_BT, document_BT=document_BT, index_T=pick(self.index_T, 0), cu_seqlens=None)

    def of_documents(self, document_BU: Tensor, *, packed: bool, seed_step: int) -> "SequenceInfo":
        """Other tokens of these rows, whole on this process: ``document_BU`` numbers their documents, [B, U], each in one piece.

        They count their positions anew, and draw with another seed, ``seed_step`` after the one here.
        """
        index_U = torch.arange(document_BU.shape[1], device=document_BU.device)
        begins_BU = torch.cat([torch.ones_like(document_BU[:, :1], dtype=torch.bool), document_BU[:, 1:] != document_BU[:, :-1]], dim=1)
        return replace(
            self,
            position_BT=index_U - torch.where(begins_BU, index_U, 0).cummax(1).values,
            document_BT=document_BU,
            index_T=index_U,
            length=len(index_U),
            seed=None if self.seed is None else (self.seed + seed_step) % 2**63,
            packed=packed,
            contiguous=True,
            cu_seqlens=None,
            halo=LocalHalo(),
            undivided=None,
        )

    @staticmethod
    def whole(
        n_rows: int, length: int, *, seed: int | None = None, first_row: int = 0, device: torch.device | str = "cpu"
    ) -> "SequenceInfo":
        """Rows of one document each, whole on this process: what generation and tests use."""
        index_T = torch.arange(length, device=device)
        return SequenceInfo(
            position_BT=index_T.expand(n_rows, length),
            document_BT=torch.zeros(n_rows, length, dtype=torch.int64, device=device),
            index_T=index_T,
            row_B=torch.arange(first_row, first_row + n_rows, device=device),
            length=length,
            seed=seed,
            packed=False,
        )

    @staticmethod
    def of_lengths(
        lengths: Sequence[Sequence[int]], *, seed: int | None = None, first_row: int = 0, device: torch.device | str = "cpu"
    ) -> "SequenceInfo":
        """Packed rows, whole on this process: the lengths of the documents of each row, whose sums are the same."""
        document_BT = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]).to(device)
        rows = SequenceInfo.whole(len(lengths), document_BT.shape[1], seed=seed, first_row=first_row, device=device)
        return rows.of_documents(document_BT, packed=True, seed_step=0)


@dataclass(frozen=True)
class MixSequence:
    """The two sides of a mix step: queries are the tokens written, keys the tokens read.

    They are the same object but under context parallelism by GATHER or RING, and in decoding with a cache.
    ``first_head``: global number of the first query head here, and ``site``: number of the block; both key random
    draws.

    Under RING the keys are one part of those that the queries read, and ``mix`` runs once for each. ``wants_lse``: it then
    returns ``lse_BTH``, differentiable, and normalizes over this part alone; a query that sees none of its keys has y 0 and
    lse -inf. ``holds_sinks``: whether this part is the one that counts what a query weighs beside its keys, such as a sink.
    """

    query: SequenceInfo
    key: SequenceInfo
    first_head: int = 0
    site: int = 0
    wants_lse: bool = False
    holds_sinks: bool = True
