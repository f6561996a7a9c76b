"""Rows that are the same at every call: for validation, and for the training loss on a fixed subset."""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, Protocol

import numpy as np

from titanarch.data.batch import Batch, Windows, filler, joined, make_batch
from titanarch.data.cache import open_mixture, open_tokens
from titanarch.data.config import DataConfig
from titanarch.data.errors import data_error
from titanarch.data.indexed import IndexedData
from titanarch.data.mixed_rows import interleaved, mixture_order
from titanarch.data.mixed_streams import MixedStreamReader, mixed_stream_windows, repeating
from titanarch.data.rows import read_windows
from titanarch.data.shuffle import Shuffle
from titanarch.data.sources import MixtureConfig, Split
from titanarch.data.split import SplitSource, opened_mixture
from titanarch.data.streams import Cursor, StreamReader, stream_windows
from titanarch.data.tokenizers import Tokenizer


class _Rows(Protocol):
    """A set of rows numbered from 0."""

    seq_len: int

    def __len__(self) -> int: ...

    def batch(self, row_B: np.ndarray) -> Batch: ...


class FixedBatches:
    """Rows 0 to ``n_rows`` of ``rows``, in batches: number q of rank r holds rows (q * dp_degree + r) * b + [0, b).

    The last batches are filled up with rows that have no target, so every rank has the same number of equal batches.
    May be iterated any number of times.
    """

    def __init__(self, rows: _Rows, *, batch_size: int, dp_rank: int, dp_degree: int) -> None:
        self.n_rows = len(rows)
        self._rows = rows
        self._batch_size, self._dp_rank, self._dp_degree = batch_size, dp_rank, dp_degree

    def __len__(self) -> int:
        return -(-self.n_rows // (self._batch_size * self._dp_degree))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = (number * self._dp_degree + self._dp_rank) * self._batch_size
            n_real = min(max(0, self.n_rows - first), self._batch_size)
            empty = filler(self._batch_size - n_real, self._rows.seq_len)
            yield joined(self._rows.batch(np.arange(first, first + n_real)), empty) if n_real else empty


class _IndexedSubset:
    """Windows spread evenly over the data; the last one may be filled up."""

    def __init__(self, data: IndexedData, *, seq_len: int, n_rows: int | None) -> None:
        self._data, self.seq_len = data, seq_len
        n_windows = max(1, -(-(data.n_tokens - 1) // seq_len))
        n_rows = n_windows if n_rows is None else min(n_rows, n_windows)
        self._window_B = np.arange(n_rows) * n_windows // n_rows

    def __len__(self) -> int:
        return len(self._window_B)

    def batch(self, row_B: np.ndarray) -> Batch:
        return make_batch(self.windows(row_B, row_B))

    def windows(self, index_B: np.ndarray, row_B: np.ndarray) -> Windows:
        """Rows ``index_B`` of the subset, numbered ``row_B``."""
        return read_windows(self._data, self._window_B[index_B], row_B=row_B, seq_len=self.seq_len)


class _MixedSubset:
    """As many windows of each source as the mixture gives it in its first ``n_rows`` rows, spread evenly over it, or all it has."""

    def __init__(self, config: MixtureConfig, data: Sequence[IndexedData], *, seq_len: int, n_rows: int) -> None:
        self.seq_len = seq_len
        whole = [_IndexedSubset(one, seq_len=seq_len, n_rows=None) for one in data]
        order = mixture_order(config, [(len(subset), seq_len) for subset in whole])
        rows = order.take(min(n_rows, sum(map(len, whole))))
        self._parts = [_IndexedSubset(one, seq_len=seq_len, n_rows=int(max(1, (rows.source_N == i).sum()))) for i, one in enumerate(data)]
        has_it = rows.index_N < np.array([len(part) for part in self._parts])[rows.source_N]
        self._source_N, self._index_N = rows.source_N[has_it], rows.index_N[has_it]

    def __len__(self) -> int:
        return len(self._source_N)

    def batch(self, row_B: np.ndarray) -> Batch:
        source_B, index_B = self._source_N[row_B], self._index_N[row_B]
        places = [(np.flatnonzero(source_B == i), part) for i, part in enumerate(self._parts)]
        read = [(place_N, part.windows(index_B[place_N], row_B[place_N])) for place_N, part in places if len(place_N)]
        return make_batch(interleaved(read, row_B))


class _ReadRows:
    """Rows of streams that were read at once. ``windows``: what makes some of them one thing."""

    def __init__(self, rows: Sequence[Any], windows: Callable[[Sequence[Any], np.ndarray], Windows], *, seq_len: int) -> None:
        self.seq_len = seq_len
        self._rows, self._windows = rows, windows

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, row_B: np.ndarray) -> Batch:
        return make_batch(self._windows([self._rows[row] for row in row_B], row_B))


def _one_stream(source: SplitSource, tokenizer: Tokenizer, *, seq_len: int) -> StreamReader:
    """The documents end to end."""
    return StreamReader(source, tokenizer, seq_len=seq_len, n_streams=1, streams=[0], cursors={}, packing="concat", shuffle=Shuffle(0, 0))


def _stream_subset(source: SplitSource, tokenizer: Tokenizer, *, seq_len: int, n_rows: int) -> _ReadRows:
    """The first rows; fewer where the documents end before."""
    reader = _one_stream(source, tokenizer, seq_len=seq_len)
    rows = list(takewhile(lambda row: row.cursor.epoch == 0, (reader.next_row(0) for _ in range(n_rows))))
    if not rows:
        raise data_error(f"the {source.split} split has fewer than the {seq_len} tokens of a row", key="data.source")
    return _ReadRows(rows, stream_windows, seq_len=seq_len)


def _mixed_stream_subset(
    mixture: MixtureConfig, sources: Sequence[SplitSource], tokenizer: Tokenizer, *, seq_len: int, n_rows: int
) -> _ReadRows:
    """The first rows of a mixture that is streamed, in one stream, up to where a source has ended."""
    readers = [_one_stream(source, tokenizer, seq_len=seq_len) for source in sources]
    reader = MixedStreamReader(repeating(mixture), readers, n_streams=1, cursors={0: (Cursor(),) * len(sources)}, next_row=0)
    rows = list(takewhile(lambda found: found.row.cursor.epoch == 0, (reader.next_row(0) for _ in range(n_rows))))
    if not rows:
        raise data_error(f"a source of the mixture has fewer than the {seq_len} tokens of a row", key="data.source.sources")
    return _ReadRows(rows, mixed_stream_windows, seq_len=seq_len)


def fixed_batches(
    config: DataConfig,
    split: Split,
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    n_rows: int | None,
    batch_size: int,
    dp_rank: int,
    dp_degree: int,
) -> FixedBatches:
    """The same rows of ``split`` at every call and in every layout, documents end to end.

    ``n_rows``: spread evenly over the split, or all there are if fewer; None: all, in which every token but the first
    is once a target or begins a document. The training split of streamed data gives its first rows, that of an indexed mixture
    rows in the shares that its first rows have; both need a number. ``batch_size`` is a rank's, in rows. Raises DataError.
    """
    if config.mode == "streamed" and split == "train":
        if n_rows is None:
            raise ValueError("streamed training data are not read to their end for a fixed subset: give n_rows")
        if isinstance(config.source, MixtureConfig):
            sources = opened_mixture(config, lambda alone: SplitSource(alone, "train"))
            rows: _Rows = _mixed_stream_subset(config.source, sources, tokenizer, seq_len=seq_len, n_rows=n_rows)
        else:
            rows = _stream_subset(SplitSource(config, split), tokenizer, seq_len=seq_len, n_rows=n_rows)
    elif isinstance(source_config := config.source_of(split), MixtureConfig):
        if n_rows is None:
            raise ValueError("a mixture has no end: give n_rows")
        rows = _MixedSubset(source_config, open_mixture(config, tokenizer), seq_len=seq_len, n_rows=n_rows)
    else:
        rows = _IndexedSubset(open_tokens(config, split, tokenizer), seq_len=seq_len, n_rows=n_rows)
    return FixedBatches(rows, batch_size=batch_size, dp_rank=dp_rank, dp_degree=dp_degree)


def documents(config: DataConfig, split: Split, tokenizer: Tokenizer) -> IndexedData:
    """The tokenized documents of ``split``, a sequence of (id, tokens, n_bytes); tokens lack the one that ends them.

    ``tokenizer.token_bytes`` gives the bytes of any span of tokens. Raises DataError.
    """
    return open_tokens(config, split, tokenizer)
