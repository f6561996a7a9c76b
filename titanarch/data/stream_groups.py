"""Documents of a stream whose rows are packed by best fit, a group at a time.

A group is read until its tokens fill a number of rows, and no further than its pass, planned as ``packing`` plans indexed data, and
its rows are given in a seeded order. The first group of a stream is small, so that a run begins at once; each is twice as large as the
one before, up to MOST_ROWS, which leaves less than 0.5 % of the places of a row empty. Streams begin with groups of different
sizes, so that these do not all end at one step.

The cursor of a stream says where the group begins and how many tokens each of its documents has. So a resume plans the group
without tokenizing it again, and tokenizes only the documents of rows that are still to come.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np

from titanarch.data.errors import data_error
from titanarch.data.packing import PackingCounts, counts, plan, summed
from titanarch.data.permutation import Permutation

FIRST_ROWS = 16
MOST_ROWS = 512


def first_rows(stream: int, n_streams: int) -> int:
    """How many rows the first group of a stream is read for."""
    return FIRST_ROWS + FIRST_ROWS * stream // n_streams


def rows_after(n_rows: int) -> int:
    """How many rows a group is read for that follows one of ``n_rows``."""
    return min(MOST_ROWS, 2 * n_rows)


def group_counts(length_D: np.ndarray, *, n_streams: int, seq_len: int) -> PackingCounts:
    """What becomes of the first pass over documents of these lengths, int64 [D], in the source's order."""
    parts = []
    for stream in range(n_streams):
        ends_D = np.cumsum(length_D[stream::n_streams])
        first, n_rows = 0, first_rows(stream, n_streams)
        while first < len(ends_D):
            before = int(ends_D[first - 1]) if first else 0
            end = min(len(ends_D), int(ends_D.searchsorted(before + n_rows * seq_len)) + 1)
            parts.append(counts("best_fit", np.concatenate([[0], ends_D[first:end] - before]), seq_len=seq_len))
            first, n_rows = end, rows_after(n_rows)
    return summed(parts)


class Group:
    """The rows of documents of these ``lengths``, in tokens; ``seed``, ``epoch`` and ``first``, the number of the first one, order them.

    Documents are kept until no row wants them any more. The first ``n_given`` rows are not given again.
    """

    def __init__(self, lengths: tuple[int, ...], *, seq_len: int, seed: int, epoch: int, first: int, n_given: int = 0) -> None:
        self.n_given = n_given
        self._lengths = lengths
        self._starts_D = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
        self._plan = plan("best_fit", self._starts_D, seq_len=seq_len)
        self._order_R = Permutation(self._plan.n_rows, seed=seed, epoch=epoch, part=first)(np.arange(self._plan.n_rows))
        self._document_P = self._starts_D.searchsorted(self._plan.start_P, side="right") - 1
        self._documents: dict[int, np.ndarray | Callable[[], np.ndarray]] = {}
        self._wanted = Counter(self._document_P.tolist())  # pieces that are to come, by document
        for row in self._order_R[:n_given]:
            self._wanted.subtract(self._document_P[self._pieces(row)].tolist())

    @property
    def is_empty(self) -> bool:
        """Whether all rows were given."""
        return self.n_given == self._plan.n_rows

    def wants(self, number: int) -> bool:
        """Whether a row that is to come has tokens of a document, numbered from 0 in the group."""
        return self._wanted[number] > 0

    def keep(self, number: int, tokens: np.ndarray | Callable[[], np.ndarray]) -> None:
        """A document's tokens, int32, or what makes them when a row wants them."""
        if self.wants(number):
            self._documents[number] = tokens

    def next_row(self, into: np.ndarray) -> list[int]:
        """Write the next row, int32 [T + 1], 0 where it is padding; where its documents end. Raises DataError where one has changed."""
        column, ends = 0, []
        for piece in range(*self._pieces(self._order_R[self.n_given]).indices(len(self._document_P))):
            number, size = int(self._document_P[piece]), int(self._plan.size_P[piece])
            begin = int(self._plan.start_P[piece] - self._starts_D[number])
            into[column : column + size] = self._tokens(number)[begin : begin + size]
            column += size
            ends.append(column)
            self._wanted[number] -= 1
            if not self.wants(number):
                del self._documents[number]
        into[column:] = 0
        self.n_given += 1
        return ends

    def _pieces(self, row: int) -> slice:
        return slice(int(self._plan.first_R[row]), int(self._plan.first_R[row + 1]))

    def _tokens(self, number: int) -> np.ndarray:
        tokens = self._documents[number]
        if callable(tokens):
            tokens = self._documents[number] = tokens()
            if len(tokens) != self._lengths[number]:
                message = f"a document has {len(tokens)} tokens and had {self._lengths[number]} when the checkpoint was taken"
                raise data_error(f"{message}: restore the training data, or start another run", key="data")
        return tokens
