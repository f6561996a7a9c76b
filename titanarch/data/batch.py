"""What the trainer receives: token rows with labels, positions and document boundaries.

Shapes: B rows, T tokens a row, S = T + 1 tokens of a window (inputs and the last target), E beginnings of documents,
I numbers that say where a row comes from.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

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
    that never changes. ``packed``: whether any row shows more than one document, padding
    being one. ``origin_BI``: as in Windows; it stays on the host.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    position_BT: Tensor
    document_BT: Tensor
    row_B: Tensor
    cu_seqlens: Tensor
    packed: bool
    origin_BI: np.ndarray | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch on ``device``; itself if it lies there."""
        if device == self.tokens_BT.device:
            return self
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, which copies to a GPU without blocking."""
        return self._mapped(torch.Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            tokens_BT=change(self.tokens_BT),
            labels_BT=change(self.labels_BT),
            position_BT=change(self.position_BT),
            document_BT=change(self.document_BT),
            row_B=change(self.row_B),
            cu_seqlens=change(self.cu_seqlens),
            packed=self.packed,
            origin_BI=self.origin_BI,
        )


class Windows(NamedTuple):
    """Rows before they are a Batch.

    ``tokens_BS``: any integer dtype. Document e of the E that begin inside a window does so at token
    ``start_column_E[e]`` (1 to T) of row ``start_row_E[e]``; a beginning at token 0 is every row's and is not listed.
    Both int64, in order. ``row_B``: numbers of the rows in the run. ``real_B``, int64: how many tokens of a row are real; the rest
    is padding, which is no target and begins where a document begins. None: there is no padding. ``origin_BI``, int64: where each row
    comes from, as ``ledger.Origins`` names its numbers; None of rows that no run trains on.
    """

    tokens_BS: np.ndarray
    start_row_E: np.ndarray
    start_column_E: np.ndarray
    row_B: np.ndarray
    real_B: np.ndarray | None = None
    origin_BI: np.ndarray | None = None


def make_batch(windows: Windows) -> Batch:
    """The rows with labels, positions and documents."""
    tokens_BS, start_row_E, start_column_E, row_B, real_B, origin_BI = windows
    n_rows, n_columns = tokens_BS.shape
    length = n_columns - 1
    n_tokens = n_rows * length
    labels_BT = tokens_BS[:, 1:].astype(np.int64)
    labels_BT[start_row_E, start_column_E - 1] = IGNORED
    if real_B is not None:
        labels_BT[np.arange(1, n_columns) >= real_B[:, None]] = IGNORED
    starts = np.arange(0, n_tokens, length)  # in the flattened batch
    inside = start_column_E < length  # a start at token T shows in the labels alone
    packed = bool(inside.any())
    if packed:
        row_starts = starts
        starts = np.concatenate([starts, start_row_E[inside] * length + start_column_E[inside]])
        starts.sort()
        lengths = np.empty_like(starts)  # of an empty document 0
        np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
        lengths[-1] = n_tokens - starts[-1]
        if not lengths.all():
            starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        document = np.arange(len(starts))
        document -= starts.searchsorted(row_starts)[starts // length]
        document_BT = np.repeat(document, lengths).reshape(n_rows, length)
        position = np.arange(n_tokens)
        position -= np.repeat(starts, lengths)
        position_BT = position.reshape(n_rows, length)
    else:
        position_BT = np.empty((n_rows, length), dtype=np.int64)
        position_BT[:] = np.arange(length)
        document_BT = np.zeros((n_rows, length), dtype=np.int64)
    cu_seqlens = np.full(n_tokens + 1, n_tokens, dtype=np.int32)
    cu_seqlens[: len(starts)] = starts
    return Batch(
        tokens_BT=torch.from_numpy(tokens_BS[:, :-1].astype(np.int64)),
        labels_BT=torch.from_numpy(labels_BT),
        position_BT=torch.from_numpy(position_BT),
        document_BT=torch.from_numpy(document_BT),
        row_B=torch.from_numpy(row_B.astype(np.int64)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        packed=packed,
        origin_BI=origin_BI,
    )


def keep_freed_memory() -> None:
    """Let this process reuse the memory of batches that are done with.

    The C library returns large blocks to the system as they are freed, and each batch then meets its memory a page at a
    time, which takes longer than filling it. It keeps blocks up to the largest it has seen freed, of at most 32 MiB (mallopt(3),
    M_MMAP_THRESHOLD), so one is enough, and none of its pages is touched.
    """
    np.empty(31 << 20, dtype=np.uint8)


def filler(n_rows: int, length: int) -> Batch:
    """Rows of token 0 that have no target and the number -1."""
    none = np.empty(0, dtype=np.int64)
    batch = make_batch(Windows(np.zeros((n_rows, length + 1), dtype=np.int64), none, none, np.full(n_rows, -1)))
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
