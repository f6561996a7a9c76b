"""Training loaders of text that is tokenized on the fly: one source, or a mixture of several."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from titanarch.data.batch import Batch, Windows, make_batch
from titanarch.data.config import DataConfig
from titanarch.data.errors import data_error
from titanarch.data.files import samples_checksum
from titanarch.data.layout import RunLayout
from titanarch.data.ledger import Origins
from titanarch.data.mixed_streams import MixedCursor, MixedStreamReader, MixedStreamRow, may_end, mixed_stream_windows
from titanarch.data.repeats import MOST_EPOCHS, repeated
from titanarch.data.row_loader import RowLoader
from titanarch.data.rows_ahead import RowsAhead
from titanarch.data.shuffle import Shuffle
from titanarch.data.skips import SkipCounts
from titanarch.data.sources import MixtureConfig
from titanarch.data.split import SplitSource
from titanarch.data.streams import Cursor, StreamReader, stream_windows
from titanarch.data.tokenizers import Tokenizer
from titanarch.data.workers import StreamWorkers


class StreamedLoader(RowLoader):
    """Rows of R streams, tokenized on the fly: row k is the next row of stream k mod R.

    The state holds the cursor of every stream of this rank. Raises ConfigError as ``RunLayout.n_streams`` does, and when the
    fifth epoch begins unless ``data.allow_repeat``; RuntimeError where a step is asked for while ``wants_merged_state``.
    """

    def __init__(
        self, source: SplitSource, tokenizer: Tokenizer, layouts: RunLayout, *, config: DataConfig, seed: int, start_row: int
    ) -> None:
        if start_row:
            raise ValueError("streams begin at row 0 or where a saved state left them")
        super().__init__(layouts, fingerprint=source.content_name(tokenizer), start_row=0)
        self._source, self._tokenizer = source, tokenizer
        self._packing, self._shuffle = config.packing, Shuffle(config.shuffle_documents, seed)
        self.n_streams = layouts.n_streams(config.streams, n_workers=config.workers)
        self._n_workers, self._allow_repeat = config.workers, config.allow_repeat
        self._cursors = {stream: Cursor() for stream in self._streams}
        self._streams_moved = False  # whether cursors here are of other streams than the next step's
        self._rows: StreamReader | MixedStreamReader | StreamWorkers | None = None
        self._skipped = SkipCounts()

    @property
    def epoch(self) -> int:
        return min(cursor.epoch for cursor in self._cursors.values())

    @property
    def skipped(self) -> SkipCounts:
        return self._skipped

    @property
    def wants_merged_state(self) -> bool:
        return self._streams_moved

    @property
    def _streams(self) -> list[int]:
        """Of this rank in the phase of the step that comes next or is under way, in ascending order."""
        return sorted(self.layout.streams(self.n_streams))

    @property
    def origins(self) -> Origins:
        return Origins(n_streams=self.n_streams)

    def _load(self, first_row: int) -> Batch:
        row_B = np.arange(first_row, first_row + self.layout.local_batch_size)
        self._begin(first_row)
        tokens_BS = np.empty((len(row_B), self.phase.seq_len + 1), dtype=np.int32)
        rows = [self._next_row(stream, tokens_S) for stream, tokens_S in zip((row_B % self.n_streams).tolist(), tokens_BS, strict=True)]
        return make_batch(self._windows(rows, row_B, tokens_BS))

    def _begin(self, first_row: int) -> None:
        """Open the streams from ``first_row`` on, unless they are open."""
        if self._rows is None:
            if self._streams_moved:
                message = f"from row {self.next_row} on, where the batch changes, the ranks have other streams than before"
                remedy = "join the state_dict() of the loaders of all ranks by merge_states, and load that into each by load_state_dict"
                raise RuntimeError(f"{message}: {remedy}")
            reader = self._open(first_row)
            self._rows = StreamWorkers(reader, self._n_workers) if self._n_workers else reader

    def _windows(self, rows: Sequence[Any], row_B: np.ndarray, tokens_BS: np.ndarray) -> Windows:
        return stream_windows(rows, row_B, tokens_BS)

    def _next_row(self, stream: int, into: np.ndarray) -> Any:
        assert self._rows is not None, "opened by _load"
        row: Any = self._rows.next_row(stream, into)
        if row.cursor.epoch >= MOST_EPOCHS and not self._allow_repeat:
            raise repeated(row.cursor.epoch + 1)
        self._cursors[stream] = row.cursor
        self._skipped = max(self._skipped, row.skipped)
        return row

    def _open(self, first_row: int) -> StreamReader | MixedStreamReader:
        """From ``first_row`` on."""
        return self._reader(self._source, self._cursors, first_row)

    def _reader(self, source: SplitSource, cursors: Mapping[int, Cursor], first_row: int) -> StreamReader:
        own = self.layout.streams(self.n_streams)  # in the order of the rows
        first = own.index(first_row % self.n_streams)
        return StreamReader(
            source,
            self._tokenizer,
            seq_len=self.phase.seq_len,
            n_streams=self.n_streams,
            streams=own[first:] + own[:first],
            cursors=cursors,
            packing=self._packing,
            shuffle=self._shuffle,
        )

    def _begin_phase(self) -> None:
        super()._begin_phase()
        self._streams_moved = self.layouts.streams_move(self._step, self.n_streams)

    def close(self) -> None:
        if isinstance(self._rows, StreamWorkers):
            self._rows.close()
        self._rows = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "streams": self.n_streams, "cursors": self._saved_cursors(), "samples": self._samples}

    def _saved_cursors(self) -> dict[str, Any]:
        return {str(stream): cursor.to_json() for stream, cursor in self._cursors.items()}

    def _restore_cursors(self, saved: Mapping[str, Any]) -> None:
        self._cursors = {stream: Cursor.from_json(saved[str(stream)]) for stream in self._streams}

    @cached_property
    def _samples(self) -> str:
        return samples_checksum(file for source in self._sources() for file in source.source.files)

    def _sources(self) -> list[SplitSource]:
        return [self._source]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._restore_cursors(state["cursors"])
        self._streams_moved = False

    def _step_of(self, state: Mapping[str, Any]) -> int:
        if state.get("streams") != self.n_streams:
            message = f"the checkpoint has {state.get('streams')} streams, the run {self.n_streams}: set data.streams to the checkpoint's"
            raise data_error(message, key="data.streams")
        step = super()._step_of(state)
        own = sorted(self.layouts.at_step(step).streams(self.n_streams))
        missing = [stream for stream in own if str(stream) not in state["cursors"]]
        if missing:
            raise ValueError(f"the state lacks streams {missing[:5]} and so was not merged from all ranks")
        if state.get("samples", self._samples) != self._samples:  # states of older runs have none
            message = "a file of the training data was replaced since the checkpoint by one of the same name and size"
            raise data_error(f"{message}: restore it, or start another run", key="data.source")
        return step


class MixedStreamLoader(StreamedLoader):
    """Rows of R streams, each of which takes its rows from several sources in their shares.

    The state holds, of every stream of this rank, the cursor in each source. Where a source may end the run, the rows of a step
    are read before it begins; the state has those alone that were handed out.
    """

    def __init__(
        self, sources: Sequence[SplitSource], mixture: MixtureConfig, tokenizer: Tokenizer, layouts: RunLayout, *,
        config: DataConfig, seed: int, start_row: int,
    ) -> None:  # fmt: skip
        super().__init__(sources[0], tokenizer, layouts, config=config, seed=seed, start_row=start_row)
        self._fingerprint = hashlib.sha256(" ".join(source.content_name(tokenizer) for source in sources).encode()).hexdigest()
        self._all, self._mixture = sources, mixture
        self._mixed: dict[int, MixedCursor] = {stream: (Cursor(),) * len(sources) for stream in self._streams}
        self._ahead = RowsAhead(mixture.names)

    def _sources(self) -> list[SplitSource]:
        return list(self._all)

    @property
    def epoch(self) -> int:
        """Of the source that has had the fewest."""
        return int(min(self.source_epochs.values()))

    @property
    def source_epochs(self) -> dict[str, float]:
        """Whole passes, by the streams of this rank."""
        return {name: float(min(at[i].epoch for at in self._mixed.values())) for i, name in enumerate(self._mixture.names)}

    @property
    def origins(self) -> Origins:
        return Origins(windows=dict.fromkeys(self._mixture.names, 0), n_streams=self.n_streams)

    def _open(self, first_row: int) -> MixedStreamReader:
        readers = [
            self._reader(source, {stream: at[i] for stream, at in self._mixed.items()}, first_row) for i, source in enumerate(self._all)
        ]
        return MixedStreamReader(self._mixture, readers, n_streams=self.n_streams, cursors=dict(self._mixed), next_row=first_row)

    def _windows(self, rows: Sequence[Any], row_B: np.ndarray, tokens_BS: np.ndarray) -> Windows:
        return mixed_stream_windows(rows, row_B, tokens_BS)

    @property
    def ended(self) -> str:
        return self._ahead.why(self._look_ahead())

    def ended_for_all(self, least: Callable[[float], float]) -> str:
        return self._ahead.why(least(self._look_ahead())) if may_end(self._mixture) else ""

    def _look_ahead(self) -> float:
        """Read this rank's rows of the next step where they may not be had; which cannot, as ``RowsAhead.lacking``."""
        if may_end(self._mixture) and not self._ahead:
            firsts = [self.layout.first_row(self._step, m) for m in range(self.accumulation_steps)]
            self._begin(firsts[0])
            rows = (first + i for first in firsts for i in range(self.layout.local_batch_size))
            self._ahead.look(rows, lambda row: self._read(row % self.n_streams))
        return self._ahead.lacking

    def _next_row(self, stream: int, into: np.ndarray) -> Any:
        if self._ahead:
            row = self._ahead.take()
            into[:] = row.row.tokens
        else:
            row = self._read(stream, into)
        self._mixed[stream] = row.cursor
        self._skipped = max(self._skipped, row.skipped)
        return row

    def _read(self, stream: int, into: np.ndarray | None = None) -> MixedStreamRow:
        assert self._rows is not None, "opened before"
        row: Any = self._rows.next_row(stream, into)
        epoch = row.cursor[row.source].epoch
        if epoch >= MOST_EPOCHS and not self._allow_repeat:
            raise repeated(epoch + 1, source=f"the source {self._mixture.names[row.source]}")
        return row

    def close(self) -> None:
        super().close()
        self._ahead.clear()

    def _saved_cursors(self) -> dict[str, Any]:
        return {str(stream): [cursor.to_json() for cursor in at] for stream, at in self._mixed.items()}

    def _restore_cursors(self, saved: Mapping[str, Any]) -> None:
        self._mixed = {stream: tuple(map(Cursor.from_json, saved[str(stream)])) for stream in self._streams}
