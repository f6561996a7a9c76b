"""The training loader: micro-batches whose rows depend on nothing but their number in the run."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from titanarch.data.batch import Batch, Windows, keep_freed_memory, make_batch
from titanarch.data.config import DataConfig
from titanarch.data.errors import data_error
from titanarch.data.files import samples_checksum
from titanarch.data.layout import RowLayout, RunLayout
from titanarch.data.ledger import Origins
from titanarch.data.mixed_rows import training_rows
from titanarch.data.mixed_streams import MixedCursor, MixedStreamReader, mixed_stream_windows
from titanarch.data.phases import Phase, Phases
from titanarch.data.repeats import MOST_EPOCHS, Passes, repeated
from titanarch.data.rows import RunRows
from titanarch.data.shuffle import Shuffle
from titanarch.data.skips import SkipCounts
from titanarch.data.sources import MixtureConfig
from titanarch.data.split import SplitSource, opened_mixture
from titanarch.data.streams import Cursor, StreamReader, stream_windows
from titanarch.data.tokenizers import Tokenizer
from titanarch.data.workers import IndexedWorkers, StreamWorkers


class RowLoader(ABC, Iterator[Batch]):
    """An endless iterator over the micro-batches of one rank: ``accumulation_steps`` of them make a step.

    ``state_dict`` counts what was handed out, whatever workers have prepared beyond that. It holds JSON values only,
    names no rank, worker or micro-batch size, and is taken between steps. ``merge_states`` joins those of all ranks
    into one that any layout loads.
    """

    def __init__(self, layouts: RunLayout, *, fingerprint: str, start_row: int) -> None:
        self.layouts = layouts
        self._fingerprint = fingerprint
        keep_freed_memory()
        self._step, self._micro_batch = layouts.phases.step_of(start_row), 0

    @property
    def phases(self) -> Phases:
        return self.layouts.phases

    @property
    def phase(self) -> Phase:
        """Of the step that comes next or is under way."""
        return self.phases.at_step(self._step)

    @property
    def layout(self) -> RowLayout:
        """Of the step that comes next or is under way."""
        return self.layouts.at_step(self._step)

    @property
    def accumulation_steps(self) -> int:
        return self.layout.accumulation_steps

    @property
    def next_row(self) -> int:
        """The first row of the step that comes next or is under way."""
        return self.phases.rows_before(self._step)

    @property
    @abstractmethod
    def epoch(self) -> int:
        """Whole passes over the training data that are behind."""

    @property
    @abstractmethod
    def origins(self) -> Origins:
        """What ``origin_BI`` of its batches means."""

    @property
    def source_epochs(self) -> dict[str, float]:
        """Passes over each source of a mixture that are behind, by its name; empty where there is one source."""
        return {}

    def passes(self, end_row: int) -> list[Passes]:
        """How much of each source the rows before ``end_row`` take; empty where only reading will tell."""
        return []

    @property
    def skipped(self) -> SkipCounts:
        """What could not be read: of all indexed data, or of a stream's source as far as this process has read it since its start."""
        return SkipCounts()

    @property
    def ended(self) -> str:
        """Why the step that comes next cannot be had; empty where it can. Asked for between steps."""
        return ""

    def __next__(self) -> Batch:
        if self._micro_batch == 0 and (reason := self.ended):
            raise data_error(reason, key="data.source.sources")
        batch = self._load(self.layout.first_row(self._step, self._micro_batch))
        self._micro_batch += 1
        if self._micro_batch == self.accumulation_steps:
            before = self.phase
            self._step, self._micro_batch = self._step + 1, 0
            if self.phase is not before:
                self.close()
        return batch

    @abstractmethod
    def _load(self, first_row: int) -> Batch:
        """The micro-batch that begins at ``first_row``; asked for in order."""

    @abstractmethod
    def close(self) -> None:
        """Stop the workers, if any; iterating again starts them anew."""

    def state_dict(self) -> dict[str, Any]:
        """Where to go on. Raises RuntimeError inside a step, where ranks and micro-batches would be in the state."""
        if self._micro_batch:
            done = f"{self._micro_batch} of {self.accumulation_steps} micro-batches"
            raise RuntimeError(f"the data state was asked for inside a step, after {done}")
        return {"data": self._fingerprint, "phases": self.phases.state(self.next_row)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises DataError where it belongs to other data or another row length."""
        if state["data"] != self._fingerprint:
            raise data_error("the training data have changed since the checkpoint: restore them, or start another run", key="data")
        row = sum(rows for _, rows in state["phases"])
        phase = self.phases.at_row(row)
        if self.phases.state(row) != state["phases"] or (row - phase.first_row) % phase.global_batch_size:
            seen = " and ".join(f"{rows} rows of {length} tokens" for length, rows in state["phases"])
            message = f"the checkpoint stands after {seen}; from row {phase.first_row} on the run has {phase.global_batch_size} rows"
            raise data_error(f"{message} of {phase.seq_len} tokens a step", key="training.seq_len")
        self.close()
        self._step, self._micro_batch = self.phases.step_of(row), 0


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state from those of all ranks, which were taken after the same step."""
    merged = dict(states[0])
    for state in states[1:]:
        if {**state, "cursors": None} != {**merged, "cursors": None}:
            raise ValueError("the ranks' data states were not taken after the same step")
        if "cursors" in merged:
            merged["cursors"] = {**merged["cursors"], **state["cursors"]}
    return merged


class IndexedLoader(RowLoader):
    """Rows of tokenized data in a seeded order, a new one each epoch, or of several such data."""

    def __init__(self, rows: RunRows, layouts: RunLayout, *, n_workers: int, start_row: int) -> None:
        super().__init__(layouts, fingerprint=rows.fingerprint, start_row=start_row)
        self.rows = rows
        self._n_workers = n_workers
        self._workers: IndexedWorkers | None = None

    @property
    def epoch(self) -> int:
        return self.rows.epoch(self.next_row)

    @property
    def origins(self) -> Origins:
        return Origins(windows=self.rows.source_windows)

    @property
    def source_epochs(self) -> dict[str, float]:
        return self.rows.source_epochs(self.next_row)

    def passes(self, end_row: int) -> list[Passes]:
        return self.rows.passes(end_row)

    @property
    def skipped(self) -> SkipCounts:
        return self.rows.skipped

    @property
    def ended(self) -> str:
        return self.rows.ended(self.next_row + self.layout.global_batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self.rows.state(self.next_row)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.rows.begin_at(state)

    def _load(self, first_row: int) -> Batch:
        if self._n_workers == 0:
            return make_batch(self.rows.read(first_row, self.layout.local_batch_size))
        if self._workers is None:
            phase = self.phase
            until = None if phase.n_steps is None else phase.first_step + phase.n_steps
            self._workers = IndexedWorkers(
                self.rows, self.layout, step=self._step, micro_batch=self._micro_batch, until_step=until, n_workers=self._n_workers
            )
        return make_batch(self._workers.next())

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None


class StreamedLoader(RowLoader):
    """Rows of R streams, tokenized on the fly: row k is the next row of stream k mod R.

    The state holds the cursor of every stream of this rank. Raises ConfigError as ``RunLayout.streams`` does, and when the
    fifth epoch begins unless ``data.allow_repeat``.
    """

    def __init__(
        self, source: SplitSource, tokenizer: Tokenizer, layouts: RunLayout, *, config: DataConfig, seed: int, start_row: int
    ) -> None:
        if start_row:
            raise ValueError("streams begin at row 0 or where a saved state left them")
        super().__init__(layouts, fingerprint=source.content_name(tokenizer), start_row=0)
        self._source, self._tokenizer = source, tokenizer
        self._packing, self._shuffle = config.packing, Shuffle(config.shuffle_documents, seed)
        self.n_streams, self._streams = layouts.streams(config.streams, n_workers=config.workers)
        self._n_workers, self._allow_repeat = config.workers, config.allow_repeat
        self._cursors = {stream: Cursor() for stream in self._streams}
        self._rows: StreamReader | MixedStreamReader | StreamWorkers | None = None
        self._skipped = SkipCounts()

    @property
    def epoch(self) -> int:
        return min(cursor.epoch for cursor in self._cursors.values())

    @property
    def skipped(self) -> SkipCounts:
        return self._skipped

    @property
    def origins(self) -> Origins:
        return Origins(n_streams=self.n_streams)

    def _load(self, first_row: int) -> Batch:
        row_B = np.arange(first_row, first_row + self.layout.local_batch_size)
        if self._rows is None:
            reader = self._open(first_row)
            self._rows = StreamWorkers(reader, self._n_workers) if self._n_workers else reader
        return make_batch(self._windows([self._next_row(stream) for stream in (row_B % self.n_streams).tolist()], row_B))

    def _windows(self, rows: Sequence[Any], row_B: np.ndarray) -> Windows:
        return stream_windows(rows, row_B)

    def _next_row(self, stream: int) -> Any:
        assert self._rows is not None, "opened by _load"
        row: Any = self._rows.next_row(stream)
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
        if state.get("streams") != self.n_streams:
            message = f"the checkpoint has {state.get('streams')} streams, the run {self.n_streams}: set data.streams to the checkpoint's"
            raise data_error(message, key="data.streams")
        missing = [stream for stream in self._streams if str(stream) not in state["cursors"]]
        if missing:
            raise ValueError(f"the state lacks streams {missing[:5]} and so was not merged from all ranks")
        super().load_state_dict(state)
        if state.get("samples", self._samples) != self._samples:  # states of older runs have none
            message = "a file of the training data was replaced since the checkpoint by one of the same name and size"
            raise data_error(f"{message}: restore it, or start another run", key="data.source")
        self._restore_cursors(state["cursors"])


class MixedStreamLoader(StreamedLoader):
    """Rows of R streams, each of which takes its rows from several sources in their shares.

    The state holds, of every stream of this rank, the cursor in each source.
    """

    def __init__(
        self, sources: Sequence[SplitSource], mixture: MixtureConfig, tokenizer: Tokenizer, layouts: RunLayout, *,
        config: DataConfig, seed: int, start_row: int,
    ) -> None:  # fmt: skip
        super().__init__(sources[0], tokenizer, layouts, config=config, seed=seed, start_row=start_row)
        self._fingerprint = hashlib.sha256(" ".join(source.content_name(tokenizer) for source in sources).encode()).hexdigest()
        self._all, self._mixture = sources, mixture
        self._mixed: dict[int, MixedCursor] = {stream: (Cursor(),) * len(sources) for stream in self._streams}

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

    def _windows(self, rows: Sequence[Any], row_B: np.ndarray) -> Windows:
        return mixed_stream_windows(rows, row_B)

    def _next_row(self, stream: int) -> Any:
        assert self._rows is not None, "opened by _load"
        row: Any = self._rows.next_row(stream)
        epoch = row.cursor[row.source].epoch
        if epoch >= MOST_EPOCHS and not self._allow_repeat:
            raise repeated(epoch + 1, source=f"the source {self._mixture.names[row.source]}")
        self._mixed[stream] = row.cursor
        self._skipped = max(self._skipped, row.skipped)
        return row

    def _saved_cursors(self) -> dict[str, Any]:
        return {str(stream): [cursor.to_json() for cursor in at] for stream, at in self._mixed.items()}

    def _restore_cursors(self, saved: Mapping[str, Any]) -> None:
        self._mixed = {stream: tuple(map(Cursor.from_json, saved[str(stream)])) for stream in self._streams}


def build_loader(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    global_batch_size: int,
    local_batch_size: int,
    dp_rank: int,
    dp_degree: int,
    seed: int,
    start_row: int = 0,
    earlier: Sequence[Phase] = (),
) -> RowLoader:
    """The training loader of one data-parallel rank.

    ``seq_len``: tokens a row. Batch sizes are in rows. ``seed`` orders the rows. ``start_row`` begins a step; streams
    start elsewhere than at 0 by ``load_state_dict`` alone. ``earlier``: phases before that of these sizes. The
    first call for a text source in indexed mode tokenizes it into the cache while other processes wait. Raises ConfigError,
    and DataError for what is wrong with the data.
    """
    phases = Phases.of([*earlier, Phase(seq_len, global_batch_size, local_batch_size)])
    layouts = RunLayout(phases, dp_rank, dp_degree)
    if config.mode == "indexed":
        rows = training_rows(config, tokenizer, seq_len=seq_len, seed=seed, phases=phases)
        return IndexedLoader(rows, layouts, n_workers=config.workers, start_row=start_row)
    if isinstance(config.source, MixtureConfig):
        sources = opened_mixture(config, lambda alone: SplitSource(alone, "train"))
        return MixedStreamLoader(sources, config.source, tokenizer, layouts, config=config, seed=seed, start_row=start_row)
    source = SplitSource(config, "train")
    return StreamedLoader(source, tokenizer, layouts, config=config, seed=seed, start_row=start_row)
