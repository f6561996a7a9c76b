"""Streamed rows: documents tokenized on the fly, in R logical streams.

Document i of a split, in the order that ``Shuffle`` gives it, goes to stream i mod R. A stream is its documents end to
end, and its rows are windows of T + 1 tokens, T apart; or each document is a row, padded; or groups of documents are
packed by best fit. At the end of the source every stream begins it again. One reader goes through the source once for
all the streams it serves; the documents of a stream that is behind are put aside meanwhile.
"""

import errno
import os
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from titanarch.data.batch import Windows
from titanarch.data.errors import data_error
from titanarch.data.packing import Packing
from titanarch.data.shuffle import Place, Shuffle
from titanarch.data.skips import SkipCounts
from titanarch.data.sources import Position
from titanarch.data.split import Record, SplitSource
from titanarch.data.stream_groups import Group, first_rows, rows_after
from titanarch.data.tokenizers import Tokenizer

ASIDE_BYTES = 32 << 20  # texts put aside in memory; beyond, they go to a temporary file
NO_TOKENS = np.empty(0, dtype=np.int32)


class Cursor(NamedTuple):
    """Where a stream goes on: ``skip`` tokens into document ``number`` of the split's order, in pass ``epoch``.

    ``file``, ``offset``, ``record`` are the Position of the first document of its block. Of rows by best fit, ``number`` is the first
    document of a group that was read for ``group_rows`` rows and has documents of ``lengths`` tokens, and ``skip`` counts its rows.
    """

    epoch: int = 0
    number: int = 0
    file: int = 0
    offset: int = 0
    record: int = 0
    skip: int = 0
    group_rows: int = 0
    lengths: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        values = self._asdict()
        return values if self.group_rows else {name: values[name] for name in Cursor._fields[:6]}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Cursor":
        return Cursor(**{**values, "lengths": tuple(values.get("lengths", ()))})


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
        self._in_memory = self._in_file = self._end = 0
        self._file: Any = None

    def put(self, text: str) -> str | tuple[int, int]:
        """What ``take`` gives the text back for, once. Raises OSError where the disk is full."""
        if self._in_memory + sys.getsizeof(text) <= ASIDE_BYTES:
            self._in_memory += sys.getsizeof(text)
            return text
        content = text.encode()
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as this object
        if os.pwrite(self._file.fileno(), content, self._end) != len(content):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, for texts of streams that are put aside", tempfile.gettempdir())
        place, self._end = self._end, self._end + len(content)
        self._in_file += 1
        return place, len(content)

    def take(self, kept: str | tuple[int, int]) -> str:
        if isinstance(kept, str):
            self._in_memory -= sys.getsizeof(kept)
            return kept
        place, n_bytes = kept
        text = os.pread(self._file.fileno(), n_bytes, place).decode()
        self._in_file -= 1
        if self._in_file == 0:
            self._file.truncate(0)
            self._end = 0
        return text


class _Stream:
    """A stream: the document it goes on with, and those put aside for it.

    ``at``: its cursor after the last row. ``rest``: what is left of the document ``place`` of pass ``epoch``, of ``n_tokens`` in all;
    the stream ``is_open`` from the first row on. ``waiting`` holds (epoch, place, text kept). ``group``: by best fit, the documents
    that are packed together.
    """

    def __init__(self, begin: Cursor) -> None:
        self.begin = self.at = begin
        self.waiting: deque[tuple[int, Place, str | tuple[int, int]]] = deque()
        self.is_open = False
        self.epoch, self.place, self.n_tokens, self.rest = 0, Place(0, Position()), 0, NO_TOKENS
        self.group: Group | None = None

    def go_on(self, rest: np.ndarray) -> None:
        """A row was taken, and ``rest`` of the document is left."""
        self.rest = rest
        place, block = self.place, self.place.block
        self.at = Cursor(self.epoch, place.number, block.file, block.offset, block.record, self.n_tokens - len(rest))


class StreamReader:
    """The rows of some streams of a split.

    ``cursors`` gives the cursor of each stream in ``streams``; a stream without one begins at the beginning.
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
        self.streams = list(streams)
        self._packing, self._shuffle = packing, shuffle
        self._source, self._tokenizer = source, tokenizer
        self._seq_len, self._n_streams, self._cursors = seq_len, n_streams, dict(cursors)
        self._state = {stream: _Stream(cursors.get(stream, Cursor())) for stream in streams}
        self._aside = _Aside()
        self._scan: Iterator[tuple[int, Record, Place]] | None = None  # begun at the first row, so that a fresh reader pickles

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

    def _scanned(self) -> Iterator[tuple[int, Record, Place]]:
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

    def _next_document(self, stream: _Stream) -> np.ndarray:
        """Go on to the next document of ``stream`` that has a token; its tokens."""
        while True:
            stream.epoch, stream.place, text = self._next_text(stream)
            tokens = self._tokenizer.encode_document(text)
            stream.n_tokens = len(tokens)
            if stream.n_tokens:
                return tokens

    def _next_text(self, stream: _Stream) -> tuple[int, Place, str]:
        if not stream.waiting:
            return self._found(stream)
        epoch, place, kept = stream.waiting.popleft()
        return epoch, place, self._aside.take(kept)

    def _found(self, stream: _Stream) -> tuple[int, Place, str]:
        """The next document of ``stream``; those of others that come before it are put aside."""
        self._scan = self._scan or self._scanned()
        for epoch, record, place in self._scan:
            owner = self._state.get(place.number % self._n_streams)
            if owner is not None and (epoch, place.number) >= owner.begin[:2]:
                text = self._source.text(record)
                if owner is stream:
                    return epoch, place, text
                owner.waiting.append((epoch, place, self._aside.put(text)))
        raise AssertionError("passes never end")

    def next_row(self, number: int, into: np.ndarray | None = None) -> StreamRow:
        """The next row of stream ``number``; its tokens are written to ``into``, int32 [T + 1], if that is given."""
        stream = self._state[number]
        row = np.empty(self._seq_len + 1, dtype=np.int32) if into is None else into
        before, real = stream.at, len(row)
        if self._packing == "best_fit":
            starts, real = self._packed(stream, number, row)
            return StreamRow(row, starts, stream.at, real, before, self.skipped)
        if not stream.is_open:
            stream.rest, stream.is_open = self._next_document(stream)[stream.begin.skip :], True
        if self._packing == "concat":
            starts = self._fill(stream, row)
        else:
            starts = self._fill_padded(stream, row)
            real = starts[0] if starts else real
        return StreamRow(row, starts, stream.at, real, before, self.skipped)

    def _fill(self, stream: _Stream, row: np.ndarray) -> list[int]:
        """Documents end to end; where they begin. The stream goes on with the last token of the row, which is an input then."""
        starts: list[int] = []
        place, n_wanted, rest = 0, len(row), stream.rest
        while (end := place + len(rest)) < n_wanted:
            row[place:end] = rest
            if end > place:
                starts.append(end)
            place, rest = end, self._next_document(stream)
        row[place:] = rest[: n_wanted - place]
        stream.go_on(rest[n_wanted - 1 - place :])
        return starts

    def _fill_padded(self, stream: _Stream, row: np.ndarray) -> list[int]:
        """The next document, as much as a row takes; where the padding begins. The stream stays on it, with all of its tokens behind."""
        tokens = stream.rest if len(stream.rest) else self._next_document(stream)
        real = min(len(tokens), len(row))
        row[:real] = tokens[:real]
        row[real:] = 0
        stream.go_on(NO_TOKENS)
        return [real] if real < len(row) else []

    def _packed(self, stream: _Stream, number: int, row: np.ndarray) -> tuple[list[int], int]:
        """The next row of the stream's group, or of the one after it; where documents and the padding begin, and tokens that are real."""
        if stream.group is None and stream.at.group_rows:
            self._resume_group(stream)
        while stream.group is None or stream.group.is_empty:
            n_rows = rows_after(stream.at.group_rows) if stream.at.group_rows else first_rows(number, self._n_streams)
            self._next_group(stream, n_rows)
        ends = stream.group.next_row(row)
        stream.at = stream.at._replace(skip=stream.group.n_given)
        return [end for end in ends if end < len(row)], ends[-1]

    def _next_group(self, stream: _Stream, n_rows: int) -> None:
        """Read documents until their tokens fill ``n_rows`` or the pass ends."""
        documents: list[np.ndarray] = []
        n_tokens = 0
        while n_tokens < n_rows * self._seq_len:
            epoch, place, text = self._next_text(stream)
            if n_tokens and epoch != stream.epoch:
                stream.waiting.appendleft((epoch, place, self._aside.put(text)))
                break
            if not n_tokens:  # documents without a token before it are of no group
                documents.clear()
                stream.epoch, stream.place = epoch, place
            documents.append(self._tokenizer.encode_document(text))
            n_tokens += len(documents[-1])
        lengths = tuple(map(len, documents))
        stream.at = Cursor(stream.epoch, stream.place.number, *stream.place.block, group_rows=n_rows, lengths=lengths)
        stream.group = self._planned(stream.at)
        for number, tokens in enumerate(documents):
            stream.group.keep(number, tokens)

    def _resume_group(self, stream: _Stream) -> None:
        """Read the documents of the group again that the cursor says; those of rows to come are tokenized when their row comes."""
        stream.group = self._planned(stream.at)
        for number in range(len(stream.at.lengths)):
            if not stream.waiting:
                epoch, place, text = self._found(stream)
                stream.waiting.append((epoch, place, self._aside.put(text)))
            stream.epoch, stream.place, kept = stream.waiting.popleft()
            if stream.group.wants(number):
                stream.group.keep(number, partial(self._tokens_of, kept))
            else:
                self._aside.take(kept)

    def _planned(self, at: Cursor) -> Group:
        seed = self._shuffle.seed
        return Group(at.lengths, seq_len=self._seq_len, seed=seed, epoch=at.epoch, first=at.number, n_given=at.skip)

    def _tokens_of(self, kept: str | tuple[int, int]) -> np.ndarray:
        return self._tokenizer.encode_document(self._aside.take(kept))


def stream_windows(rows: Sequence[StreamRow], row_B: np.ndarray, tokens_BS: np.ndarray | None = None) -> Windows:
    """Rows of streams together; ``row_B`` int64 are their numbers in the run, ``tokens_BS`` their tokens if they lie there already."""
    if tokens_BS is None:
        tokens_BS = np.stack([row.tokens for row in rows])
    reals = [row.real for row in rows]
    origins: list[int] = []
    for row in rows:
        origins += (*_place(row.before), *_place(row.cursor))
    return Windows(
        tokens_BS,
        np.array([number for number, row in enumerate(rows) for _ in row.starts], dtype=np.int64),
        np.array([start for row in rows for start in row.starts], dtype=np.int64),
        row_B,
        np.array(reals) if min(reals) < tokens_BS.shape[1] else None,
        np.array(origins, dtype=np.int64).reshape(len(rows), -1),
    )


def _place(cursor: Cursor) -> tuple[int, int, int]:
    return cursor.epoch, cursor.number, cursor.skip
