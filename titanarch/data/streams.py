"""Streamed rows: documents tokenized on the fly, in R logical streams.

Document i of a split, in the order that ``Shuffle`` gives it, goes to stream i mod R. A stream is its documents end to
end; its rows are windows of T + 1 tokens, T apart; or each document is a row, padded. At the end of the source every
stream begins it again. One reader goes through the source once for all the streams it serves; the documents of a
stream that is behind are put aside meanwhile.
"""

import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from titanarch.data.batch import Windows
from titanarch.data.errors import data_error
from titanarch.data.packing import Packing
from titanarch.data.shuffle import Shuffle
from titanarch.data.skips import SkipCounts
from titanarch.data.sources import Position
from titanarch.data.split import Record, SplitSource
from titanarch.data.tokenizers import Tokenizer

ASIDE_BYTES = 32 << 20  # texts put aside in memory; beyond, they go to a temporary file


class Cursor(NamedTuple):
    """Where a stream goes on: ``skip`` tokens into document ``number`` of the split's order, in pass ``epoch``.

    ``file``, ``offset``, ``record`` are the Position of the first document of its block.
    """

    epoch: int = 0
    number: int = 0
    file: int = 0
    offset: int = 0
    record: int = 0
    skip: int = 0

    def to_json(self) -> dict[str, int]:
        return self._asdict()

    @staticmethod
    def from_json(values: Mapping[str, int]) -> "Cursor":
        return Cursor(**values)


class StreamRow(NamedTuple):
    """One row: tokens int32 [T + 1], the columns (1 to T) where documents or the padding begin, the stream's cursor after it,
    how many of the tokens are real, the stream's cursor before it, and what its reader has passed over so far."""

    tokens: np.ndarray
    starts: list[int]
    cursor: Cursor
    real: int
    before: Cursor
    skipped: SkipCounts


class _Aside:
    """Texts put aside, in memory up to ASIDE_BYTES and in a temporary file beyond."""

    def __init__(self) -> None:
        self._in_memory = self._in_file = 0
        self._file: Any = None

    def put(self, text: str) -> str | tuple[int, int]:
        """What ``take`` gives the text back for, once."""
        if self._in_memory + sys.getsizeof(text) <= ASIDE_BYTES:
            self._in_memory += sys.getsizeof(text)
            return text
        content = text.encode()
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        place = self._file.seek(0, 2)
        self._file.write(content)
        self._in_file += 1
        return place, len(content)

    def take(self, kept: str | tuple[int, int]) -> str:
        if isinstance(kept, str):
            self._in_memory -= sys.getsizeof(kept)
            return kept
        self._file.seek(kept[0])
        text = self._file.read(kept[1]).decode()
        self._in_file -= 1
        if self._in_file == 0:
            self._file.truncate(0)
        return text


@dataclass
class _Stream:
    """A stream: the document it goes on with, its tokens at hand, and texts put aside.

    ``at``: its cursor after the last row. ``waiting`` holds (epoch, place, text kept); ``tokenized`` holds (epoch, place,
    tokens), the first one begun at ``skip``. A place is a Record that the Shuffle made.
    """

    begin: Cursor
    at: Cursor
    skip: int
    waiting: deque[tuple[int, Record, str | tuple[int, int]]]
    tokenized: deque[tuple[int, Record, np.ndarray]]


class StreamReader:
    """The rows of some streams of a split.

    ``cursors`` gives the cursor of each stream in ``streams``; a stream without one begins at the beginning. ``packing`` is
    "concat" or "padded".
    Raises DataError where the data cannot be read, or have fewer documents than ``n_streams``.
    """

    def __init__(
        self,
        source: SplitSource,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        n_streams: int,
        streams: Sequence[int],
        cursors: Mapping[int, Cursor],
        packing: Packing,
        shuffle: Shuffle,
    ) -> None:
        assert packing != "best_fit", "the configuration refuses it for streams"
        self.streams = list(streams)
        self._packing, self._shuffle = packing, shuffle
        self._source, self._tokenizer = source, tokenizer
        self._seq_len, self._n_streams, self._cursors = seq_len, n_streams, dict(cursors)
        begins = {stream: cursors.get(stream, Cursor()) for stream in streams}
        self._state = {stream: _Stream(begin, begin, begin.skip, deque(), deque()) for stream, begin in begins.items()}
        self._aside = _Aside()
        self._scan: Iterator[tuple[int, Record, Record]] | None = None  # begun at the first row, so that a fresh reader pickles

    @property
    def skipped(self) -> SkipCounts:
        """What was passed over so far."""
        return self._source.source.skips.counts

    def only(self, streams: Sequence[int]) -> "StreamReader":
        """A fresh reader of some of the streams, from the cursors that this one began with."""
        return StreamReader(
            self._source,
            self._tokenizer,
            seq_len=self._seq_len,
            n_streams=self._n_streams,
            streams=streams,
            cursors=self._cursors,
            packing=self._packing,
            shuffle=self._shuffle,
        )

    def _scanned(self) -> Iterator[tuple[int, Record, Record]]:
        """(epoch, document, its place) from the block of the earliest cursor on, pass after pass, for ever."""
        first = min((stream.begin for stream in self._state.values()), key=lambda cursor: (cursor.epoch, cursor.number))
        epoch = first.epoch
        block = Position(first.file, first.offset, first.record)
        start: Record | None = Record(self._shuffle.block_start(first.number), block, None)
        while True:
            n_documents = 0
            for record, place in self._shuffle(self._source.records(start), epoch=epoch):
                n_documents = place.number + 1
                yield epoch, record, place
            if n_documents == 0 and start is not None and start.number == 0:
                raise self._source.empty()
            if 0 < n_documents < self._n_streams:
                message = f"the {self._source.split} split has {n_documents} documents, fewer than the {self._n_streams} streams"
                raise data_error(f"{message}: set data.streams and training.global_batch_size to fewer", key="data.streams")
            epoch, start = epoch + 1, None

    def _next_document(self, stream: _Stream) -> None:
        """Tokenize the next document of ``stream``."""
        epoch, place, text = self._put_aside(stream) if stream.waiting else self._found(stream)
        stream.tokenized.append((epoch, place, self._tokenizer.encode_document(text)))

    def _put_aside(self, stream: _Stream) -> tuple[int, Record, str]:
        epoch, place, kept = stream.waiting.popleft()
        return epoch, place, self._aside.take(kept)

    def _found(self, stream: _Stream) -> tuple[int, Record, str]:
        """The next document of ``stream``; those of others that come before it are put aside."""
        self._scan = self._scan or self._scanned()
        for epoch, record, place in self._scan:
            owner = self._state.get(place.number % self._n_streams)
            if owner is not None and (epoch, place.number) >= (owner.begin.epoch, owner.begin.number):
                text = self._source.document(record).text
                if owner is stream:
                    return epoch, place, text
                owner.waiting.append((epoch, place, self._aside.put(text)))
        raise AssertionError("passes never end")

    def next_row(self, number: int) -> StreamRow:
        """The next row of stream ``number``."""
        stream = self._state[number]
        if self._packing == "padded":
            return self._padded_row(stream)
        n_wanted = self._seq_len + 1
        row = np.empty(n_wanted, dtype=np.int32)
        starts: list[int] = []
        n_taken = taken_documents = 0
        while n_taken < n_wanted:
            if taken_documents == len(stream.tokenized):
                self._next_document(stream)
            tokens = stream.tokenized[taken_documents][2]
            piece = tokens[0 if taken_documents else stream.skip :][: n_wanted - n_taken]
            if n_taken and len(piece):
                starts.append(n_taken)
            row[n_taken : n_taken + len(piece)] = piece
            n_taken += len(piece)
            taken_documents += 1
        self._advance(stream)
        epoch, place, _ = stream.tokenized[0]
        cursor = Cursor(epoch, place.number, *place.position, skip=stream.skip)
        before, stream.at = stream.at, cursor
        return StreamRow(row, starts, cursor, n_wanted, before, self._source.source.skips.counts)

    def _padded_row(self, stream: _Stream) -> StreamRow:
        """The next document, as much as a row takes. The cursor stays on it, with all of its tokens behind."""
        while not stream.tokenized or stream.skip >= len(stream.tokenized[0][2]):
            if stream.tokenized:
                stream.skip -= len(stream.tokenized.popleft()[2])
            else:
                self._next_document(stream)
        epoch, place, tokens = stream.tokenized[0]
        real = min(len(tokens), self._seq_len + 1)
        row = np.zeros(self._seq_len + 1, dtype=np.int32)
        row[:real] = tokens[:real]
        stream.skip = len(tokens)
        starts = [real] if real <= self._seq_len else []
        before, stream.at = stream.at, Cursor(epoch, place.number, *place.position, skip=stream.skip)
        return StreamRow(row, starts, stream.at, real, before, self._source.source.skips.counts)

    def _advance(self, stream: _Stream) -> None:
        """Go T tokens on, to the document that holds the first token of the next row."""
        stream.skip += self._seq_len
        while stream.skip >= len(stream.tokenized[0][2]):
            stream.skip -= len(stream.tokenized.popleft()[2])


def stream_windows(rows: Sequence[StreamRow], row_B: np.ndarray) -> Windows:
    """Rows of streams together; ``row_B`` int64 are their numbers in the run."""
    real_B = np.array([row.real for row in rows])
    tokens_BS = np.stack([row.tokens for row in rows])
    return Windows(
        tokens_BS,
        np.repeat(np.arange(len(rows)), [len(row.starts) for row in rows]),
        np.array([start for row in rows for start in row.starts], dtype=np.int64),
        row_B,
        real_B if (real_B < tokens_BS.shape[1]).any() else None,
        np.array([[*_place(row.before), *_place(row.cursor)] for row in rows], dtype=np.int64),
    )


def _place(cursor: Cursor) -> tuple[int, int, int]:
    return cursor.epoch, cursor.number, cursor.skip
