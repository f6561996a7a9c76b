"""What the trainer receives: token rows with labels, positions and document boundaries.

Shapes: B rows, T tokens a row, S = T + 1 tokens of a window (inputs and the last target), E document starts.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""The label of a position that has no target."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank, on the host until moved.

    ``tokens_BT`` int64. ``labels_BT`` int64: the next token, -100 where there is none or it begins the next document.
    ``position_BT`` int64: index inside the part of the document that the row shows, so it starts at 0 at the row's
    start even when the window cut the document before. ``document_BT`` int64: number of the document in its row,
    from 0. ``row_B`` int64: number of the row in the run, -1 for a row that only fills a last batch.
    ``cu_seqlens`` int32 [B * T + 1]: where documents start in the flattened batch, padded with B * T to a length
    that never changes. ``packed``: whether any row shows more than one document.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    position_BT: Tensor
    document_BT: Tensor
    row_B: Tensor
    cu_seqlens: Tensor
    packed: bool

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch on ``device``."""
        return replace(self, **{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors()})

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, which copies to a GPU without blocking."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors()})

    def _tensors(self) -> list[tuple[str, Tensor]]:
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in values if isinstance(value, Tensor)]


def make_batch(tokens_BS: np.ndarray, *, start_row_E: np.ndarray, start_column_E: np.ndarray, row_B: np.ndarray) -> Batch:
    """Rows of windows as a Batch.

    ``tokens_BS`` int64. Document e of the E that start inside a window does so at token ``start_column_E[e]``
    (1 to T) of row ``start_row_E[e]``; a start at token 0 is every row's and is not listed. Both int64, in order.
    """
    n_rows, n_columns = tokens_BS.shape
    length = n_columns - 1
    n_tokens = n_rows * length
    labels_BT = tokens_BS[:, 1:].copy()
    labels_BT[start_row_E, start_column_E - 1] = IGNORED
    inside = start_column_E < length  # a start at token T shows in the labels alone
    row_starts = np.arange(0, n_tokens, length)
    cu_seqlens = np.full(n_tokens + 1, n_tokens, dtype=np.int32)
    packed = bool(inside.any())
    if packed:
        starts = np.union1d(row_starts, start_row_E[inside] * length + start_column_E[inside])
        lengths = np.diff(starts, append=n_tokens)
        in_row = np.arange(len(starts)) - np.repeat(np.searchsorted(starts, row_starts), _per_row(starts, length, n_rows))
        position_BT = (np.arange(n_tokens) - np.repeat(starts, lengths)).reshape(n_rows, length)
        document_BT = np.repeat(in_row, lengths).reshape(n_rows, length)
    else:
        starts = row_starts
        position_BT = np.tile(np.arange(length), (n_rows, 1))
        document_BT = np.zeros((n_rows, length), dtype=np.int64)
    cu_seqlens[: len(starts)] = starts
    return Batch(
        tokens_BT=torch.from_numpy(np.ascontiguousarray(tokens_BS[:, :-1])),
        labels_BT=torch.from_numpy(labels_BT),
        position_BT=torch.from_numpy(position_BT),
        document_BT=torch.from_numpy(document_BT),
        row_B=torch.from_numpy(row_B.astype(np.int64)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        packed=packed,
    )


def _per_row(starts: np.ndarray, length: int, n_rows: int) -> np.ndarray:
    """How many of the flattened ``starts`` fall in each row."""
    return np.bincount(starts // length, minlength=n_rows)


def filler(n_rows: int, length: int) -> Batch:
    """Rows of token 0 that have no target and the number -1."""
    none = np.empty(0, dtype=np.int64)
    zeros_BS = np.zeros((n_rows, length + 1), dtype=np.int64)
    batch = make_batch(zeros_BS, start_row_E=none, start_column_E=none, row_B=np.full(n_rows, -1))
    return replace(batch, labels_BT=torch.full_like(batch.labels_BT, IGNORED))


def joined(first: Batch, second: Batch) -> Batch:
    """The rows of both batches, those of ``first`` before; all rows of one length."""
    n_first, n_tokens = first.tokens_BT.numel(), first.tokens_BT.numel() + second.tokens_BT.numel()
    starts = torch.cat([first.cu_seqlens[first.cu_seqlens < n_first], second.cu_seqlens + n_first])
    padding = starts.new_full((n_tokens + 1 - len(starts),), n_tokens)
    return Batch(
        tokens_BT=torch.cat([first.tokens_BT, second.tokens_BT]),
        labels_BT=torch.cat([first.labels_BT, second.labels_BT]),
        position_BT=torch.cat([first.position_BT, second.position_BT]),
        document_BT=torch.cat([first.document_BT, second.document_BT]),
        row_B=torch.cat([first.row_B, second.row_B]),
        cu_seqlens=torch.cat([starts, padding]),
        packed=first.packed or second.packed,
    )
