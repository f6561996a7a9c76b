"""Which documents share a row: best fit, or one document a row.

Shapes: D documents, P pieces of documents, R rows, T tokens a row.

A piece is a document, or T tokens of one that is longer than a row. Its size counts the token after its last one where the
document has one, which is then the target of the last: at most T + 1.

Best fit is best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830): pieces are taken longest
first, each goes to the row with the smallest space that holds it; of several such rows to the one that has had that space longest.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Packing = Literal["concat", "best_fit", "padded"]

GROUP_PIECES = 1 << 20
"""Pieces that may share rows: those of documents near each other, which bounds the memory of the search."""


class Plan(NamedTuple):
    """Rows as pieces of documents. Row r shows pieces ``first_R[r]`` to ``first_R[r + 1]``, one after the other from column 0 on.

    ``first_R`` int64 [R + 1]. ``start_P`` int64 [P]: the first token of the piece among all tokens. ``size_P`` int32 [P]: its tokens,
    with the target of the last, at most T + 1.
    """

    first_R: np.ndarray
    start_P: np.ndarray
    size_P: np.ndarray

    @property
    def n_rows(self) -> int:
        return len(self.first_R) - 1


class PackingCounts(NamedTuple):
    """What a packing makes of a pass over the documents.

    ``places``: rows times tokens a row. ``real``: those that hold a token and no padding. ``targets``: those that have a target.
    ``cut``: documents that no row shows whole. ``unused``: tokens that are in no row, as input or as target.
    """

    rows: int
    places: int
    real: int
    targets: int
    documents: int
    cut: int
    unused: int


def summed(parts: Sequence[PackingCounts]) -> PackingCounts:
    """Of all ``parts``, which share no row."""
    return PackingCounts(*(sum(values) for values in zip(*parts, strict=True)))


def plan(packing: Packing, starts_D: np.ndarray, *, seq_len: int) -> Plan:
    """The rows of documents that begin, and at last end, at ``starts_D``, int64 [D + 1]; ``packing`` is not "concat"."""
    if packing == "padded":
        length_D = np.diff(starts_D)
        size_P = np.minimum(length_D[length_D > 0], seq_len + 1).astype(np.int32)
        return Plan(np.arange(len(size_P) + 1), starts_D[:-1][length_D > 0], size_P)
    assert packing == "best_fit", "documents end to end need no plan"
    start_P, size_P = _pieces(starts_D, seq_len)
    n_rows = 0
    count_R: list[np.ndarray] = []
    order_P = np.empty(len(start_P), dtype=np.int64)
    for first in range(0, len(start_P), GROUP_PIECES):
        group = slice(first, first + GROUP_PIECES)
        row_P, column_P = best_fit(np.minimum(size_P[group], seq_len), seq_len)
        order_P[group] = first + np.argsort(row_P * seq_len + column_P)
        count_R.append(np.bincount(row_P))
        n_rows += len(count_R[-1])
    first_R = np.concatenate([np.zeros(1, dtype=np.int64), *count_R]).cumsum()
    return Plan(first_R, start_P[order_P], size_P[order_P])


def _pieces(starts_D: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and size of every piece. A last token that is the target of the piece before makes none of its own."""
    length_D = np.diff(starts_D)
    n_pieces_D = np.where(length_D > 0, np.maximum(1, -(-(length_D - 1) // seq_len)), 0)
    before_P = np.repeat(np.cumsum(n_pieces_D) - n_pieces_D, n_pieces_D)
    start_P = np.repeat(starts_D[:-1], n_pieces_D) + (np.arange(len(before_P)) - before_P) * seq_len
    size_P = np.minimum(np.repeat(starts_D[1:], n_pieces_D) - start_P, seq_len + 1)
    return start_P, size_P.astype(np.int32)


def best_fit(size_P: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """The row of each piece and its first column there, int64 [P] both. Sizes are 1 to ``capacity``.

    Pieces of one size are placed at once: the row with the smallest sufficient space takes as many of them as it holds, since
    what it has left is smaller still; then the next row does.
    """
    row_P, column_P = np.empty(len(size_P), dtype=np.int64), np.empty(len(size_P), dtype=np.int64)
    spaces = _Spaces(capacity)
    placed = 0
    sizes, counts = np.unique(size_P, return_counts=True)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = placed + count
        while placed < end:
            space, row_N = spaces.take(size, end - placed)
            each = space // size  # pieces that a row takes
            n = min(end - placed, len(row_N) * each)
            row_P[placed : placed + n] = np.repeat(row_N, each)[:n]
            column_P[placed : placed + n] = capacity - space + np.arange(n) % each * size
            whole, rest = divmod(n, each)
            spaces.put(space - each * size, row_N[:whole])
            if rest:
                spaces.put(space - rest * size, row_N[whole:])
            placed += n
    order_P = np.argsort(-size_P, kind="stable")
    row_of, column_of = np.empty_like(row_P), np.empty_like(column_P)
    row_of[order_P], column_of[order_P] = row_P, column_P
    return row_of, column_of


class _Spaces:
    """Rows by the space that is left in them, those of one space in the order in which they came to it."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._n_rows = 0
        self._spaces: list[int] = []  # those that some row has, ascending
        self._rows: dict[int, deque[np.ndarray]] = {}

    def take(self, size: int, count: int) -> tuple[int, np.ndarray]:
        """The smallest space of at least ``size``, and the rows with it that ``count`` pieces need, or all; else empty rows."""
        place = bisect_left(self._spaces, size)
        if place == len(self._spaces):
            n = -(-count // (self._capacity // size))
            self._n_rows += n
            return self._capacity, np.arange(self._n_rows - n, self._n_rows)
        space = self._spaces[place]
        n, parts, queue = -(-count // (space // size)), [], self._rows[space]
        while n and queue:
            part = queue.popleft()
            if len(part) > n:
                queue.appendleft(part[n:])
            parts.append(part[:n])
            n -= len(parts[-1])
        if not queue:
            del self._spaces[place], self._rows[space]
        return space, parts[0] if len(parts) == 1 else np.concatenate(parts)

    def put(self, space: int, row_N: np.ndarray) -> None:
        """``row_N`` have ``space`` left."""
        if space == 0 or len(row_N) == 0:
            return
        if space not in self._rows:
            self._rows[space] = deque()
            insort(self._spaces, space)
        self._rows[space].append(row_N)


def counts(packing: Packing, starts_D: np.ndarray, *, seq_len: int) -> PackingCounts:
    """What ``packing`` makes of a pass over documents that begin, and at last end, at ``starts_D``."""
    n_documents, n_tokens = len(starts_D) - 1, int(starts_D[-1])
    length_D = np.diff(starts_D)
    if packing == "concat":
        n_rows = max(0, n_tokens - 1) // seq_len
        places = n_rows * seq_len
        begin_D = starts_D[:-1]
        last_D = np.maximum(begin_D, starts_D[1:] - 2)  # the last token that is needed as an input
        whole_D = (begin_D // seq_len == last_D // seq_len) & (last_D < places)
        n_starts = len(np.unique(starts_D[(starts_D > 0) & (starts_D <= places)]))
        cut = int((~whole_D & (length_D > 0)).sum())
        return PackingCounts(n_rows, places, places, places - n_starts, n_documents, cut, n_tokens - (places + 1 if n_rows else 0))
    made = plan(packing, starts_D, seq_len=seq_len)
    real, targets = int(np.minimum(made.size_P, seq_len).sum()), int((made.size_P - 1).sum())
    cut = int((length_D > seq_len + 1).sum())
    unused = int(np.maximum(length_D - seq_len - 1, 0).sum()) if packing == "padded" else 0
    return PackingCounts(made.n_rows, made.n_rows * seq_len, real, targets, n_documents, cut, unused)
