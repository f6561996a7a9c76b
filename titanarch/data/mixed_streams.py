"""Rows of a mixture of sources that are streamed.

Every source has the R streams that it would have alone, and stream r of the run takes its rows from stream r of each. Which source
gives row k = n R + r follows from k: the one in whose part of [0, 1), as wide as its share, lies frac(r / R + n φ), φ the golden
ratio. The R points of a round n are 1 / R apart, so each source has its share of them to within a row; and those of one stream are
the sequence whose parts are filled most evenly (Kuipers and Niederreiter, "Uniform Distribution of Sequences", 1974, chapter 2), so
that the streams of a source stay side by side and its documents are passed through together.

A stream whose source is dropped at its end goes on with the other sources, whose shares grow. What is left of the last pass, less
than a row and its last target, is not used. Where a source ends the run, the row says so that would take tokens of its next pass.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from titanarch.config.errors import Problem
from titanarch.data.batch import Windows
from titanarch.data.errors import DataError, data_error
from titanarch.data.skips import SkipCounts
from titanarch.data.sources import MixtureConfig
from titanarch.data.sources.mixture import weight_at
from titanarch.data.streams import Cursor, StreamReader, StreamRow, stream_windows

GOLDEN = 0x9E3779B97F4A7C15  # the golden ratio's fraction, times 2^64
_ONE = 1 << 64

MixedCursor = tuple[Cursor, ...]
"""Where a stream of the run goes on in each source."""


class SourceEnded(DataError):
    """Row ``row`` of the run would be of source number ``source``, which has ended in the row's stream and ends the run."""

    def __init__(self, row: int, source: int, name: str) -> None:
        message = f"the source {name} has ended: row {row} of the run would take tokens of another pass over it"
        super().__init__(Problem(message, key="data.source.sources"))
        self.row, self.source, self.name = row, source, name

    def __reduce__(self) -> tuple[Any, ...]:
        return SourceEnded, (self.row, self.source, self.name)


class MixedStreamRow(NamedTuple):
    """A row of ``source``; the cursors of its stream after it, and what its reader has passed over of all sources so far."""

    row: StreamRow
    source: int
    cursor: MixedCursor
    skipped: SkipCounts


def source_of(row: int, n_streams: int, weights: Sequence[float]) -> int:
    """Which source gives row ``row`` where they have these weights, not all of them 0."""
    n, stream = divmod(row, n_streams)
    point = (stream * _ONE // n_streams + n * GOLDEN) % _ONE / _ONE * sum(weights)
    ends = list(accumulate(weights))
    return next((i for i, end in enumerate(ends) if point < end), ends.index(ends[-1]))


class MixedStreamReader:
    """The rows of some streams of the run, from row ``next_row`` on. ``readers``: one a source, of these streams, from ``cursors`` on."""

    def __init__(
        self,
        config: MixtureConfig,
        readers: Sequence[StreamReader],
        *,
        n_streams: int,
        cursors: Mapping[int, MixedCursor],
        next_row: int,
    ) -> None:
        self._config, self._readers, self._n_streams, self._next_row = config, readers, n_streams, next_row
        self.streams = readers[0].streams
        self._begin = cursors
        self._cursors = {stream: list(cursors[stream]) for stream in self.streams}
        self._row = {stream: next_row + (stream - next_row) % n_streams for stream in self.streams}

    def only(self, streams: Sequence[int]) -> "MixedStreamReader":
        """A fresh reader of some of the streams, from the cursors that this one began with."""
        readers = [reader.only(streams) for reader in self._readers]
        return MixedStreamReader(self._config, readers, n_streams=self._n_streams, cursors=self._begin, next_row=self._next_row)

    def next_row(self, number: int, into: np.ndarray | None = None) -> MixedStreamRow:
        """The next row of stream ``number``, as of ``StreamReader``.

        Raises SourceEnded where a source ends that is to stop or the last one that is to be dropped, and DataError where no source
        that is left has a weight.
        """
        row, cursors = self._row[number], self._cursors[number]
        self._row[number] += self._n_streams
        while True:
            source = source_of(row, self._n_streams, self._weights(row, cursors))
            taken = self._readers[source].next_row(number, into)
            cursors[source] = taken.cursor
            if not self._ended(source, taken.cursor):
                break
            if self._config.sources[source].at_end == "stop" or all(self._ended(i, cursor) for i, cursor in enumerate(cursors)):
                raise SourceEnded(row, source, self._config.names[source])
        counts = [reader.skipped for reader in self._readers]
        skipped = SkipCounts(sum(each.documents for each in counts), sum(each.files for each in counts))
        return MixedStreamRow(taken, source, tuple(cursors), skipped)

    def _ended(self, source: int, cursor: Cursor) -> bool:
        return cursor.epoch > 0 and self._config.sources[source].at_end != "repeat"

    def _weights(self, row: int, cursors: Sequence[Cursor]) -> list[float]:
        parts = self._config.sources
        ended = [self._ended(i, cursor) for i, cursor in enumerate(cursors)]
        weights = [0.0 if gone else weight_at(part.knots, row) for part, gone in zip(parts, ended, strict=True)]
        if not any(weights):
            names = ", ".join(f"the source {name}" for name, gone in zip(self._config.names, ended, strict=True) if gone)
            raise data_error(f"{names} ended, and no other has a weight at row {row}", key="data.source.sources")
        return weights


def may_end(config: MixtureConfig) -> bool:
    """Whether a row can raise SourceEnded."""
    ends = [part.at_end for part in config.sources]
    return "stop" in ends or "repeat" not in ends


def repeating(config: MixtureConfig) -> MixtureConfig:
    """The mixture with sources that all begin again at their ends."""
    return config.model_copy(update={"sources": tuple(part.model_copy(update={"at_end": "repeat"}) for part in config.sources)})


def mixed_stream_windows(rows: Sequence[MixedStreamRow], row_B: np.ndarray, tokens_BS: np.ndarray | None = None) -> Windows:
    """As ``stream_windows``."""
    windows = stream_windows([each.row for each in rows], row_B, tokens_BS)
    assert windows.origin_BI is not None, "rows of streams say where they come from"
    source_B1 = np.array([[each.source] for each in rows], dtype=np.int64)
    return windows._replace(origin_BI=np.concatenate([source_B1, windows.origin_BI], axis=1))
