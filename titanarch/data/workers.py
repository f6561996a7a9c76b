"""Loader processes. torchdata's StatefulDataLoader is their pool; the state of a run is never theirs."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Any

from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from titanarch.config.errors import ConfigError
from titanarch.data.batch import Windows
from titanarch.data.layout import RowLayout
from titanarch.data.rows import IndexedRows
from titanarch.data.streams import StreamReader, StreamRow

NEVER = 1 << 40  # steps between the pool's own snapshots, which nothing reads


def _as_it_is(item: Any) -> Any:
    """The pool's collate function: its own would turn arrays into tensors."""
    return item


def _start_method() -> BaseContext:
    """A server that imports this module once and forks: a fork of the trainer may copy a lock that a thread holds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class _FirstRows(Sampler[int]):
    """The first row of each micro-batch from one on, for ever."""

    def __init__(self, layout: RowLayout, *, step: int, micro_batch: int) -> None:
        self._layout, self._step, self._micro_batch = layout, step, micro_batch

    def __iter__(self) -> Iterator[int]:
        step, micro_batch = self._step, self._micro_batch
        while True:
            yield self._layout.first_row(step, micro_batch)
            micro_batch += 1
            if micro_batch == self._layout.accumulation_steps:
                step, micro_batch = step + 1, 0


class _IndexedDataset(Dataset[Windows]):
    def __init__(self, rows: IndexedRows, n_rows: int) -> None:
        self._rows, self._n_rows = rows, n_rows

    def __getitem__(self, first_row: int) -> Windows:
        return self._rows.read(first_row, self._n_rows)


class IndexedWorkers:
    """Processes that read the micro-batches of a rank from one on; plain arrays are cheaper to hand over than a Batch."""

    def __init__(self, rows: IndexedRows, layout: RowLayout, *, step: int, micro_batch: int, n_workers: int) -> None:
        self._windows: Iterator[Windows] = iter(
            StatefulDataLoader(
                _IndexedDataset(rows, layout.local_batch_size),
                batch_size=None,
                sampler=_FirstRows(layout, step=step, micro_batch=micro_batch),
                num_workers=n_workers,
                collate_fn=_as_it_is,
                snapshot_every_n_steps=NEVER,
                multiprocessing_context=_start_method(),
            )
        )

    def next(self) -> Windows:
        return next(self._windows)


class _StreamDataset(IterableDataset[Any]):
    """Worker w of W serves every W-th stream of the rank, beginning with the w-th.

    The pool asks its workers in turn, so a round over the streams is filled up with None to a multiple of W. What is
    wrong with the data is handed over as a value: the pool would wrap the exception in a traceback.
    """

    def __init__(self, reader: StreamReader) -> None:
        self._reader = reader

    def __iter__(self) -> Iterator[StreamRow | ConfigError | None]:
        worker = get_worker_info()
        assert worker is not None, "runs in a worker"
        streams = self._reader.streams
        mine = streams[worker.id :: worker.num_workers]
        rounds = -(-len(streams) // worker.num_workers)
        reader = self._reader.only(mine)
        while True:
            for stream in [*mine, *[None] * (rounds - len(mine))]:
                try:
                    item = None if stream is None else reader.next_row(stream)
                except ConfigError as error:
                    yield error
                    return
                yield item


class StreamWorkers:
    """Processes that tokenize the streams of ``reader``; the rows come in the order of ``reader.streams``."""

    def __init__(self, reader: StreamReader, n_workers: int) -> None:
        self._n_streams, self._n_workers = len(reader.streams), n_workers
        self._rows = iter(
            StatefulDataLoader(
                _StreamDataset(reader),
                batch_size=None,
                num_workers=n_workers,
                collate_fn=_as_it_is,
                prefetch_factor=max(2, self._n_streams // n_workers),
                snapshot_every_n_steps=NEVER,
                multiprocessing_context=_start_method(),
            )
        )
        self._place = 0

    def next_row(self, stream: int) -> StreamRow:
        """The next row, which the caller knows to be of ``stream``."""
        item = next(self._rows)
        self._place += 1
        if self._place == self._n_streams:  # the None that fill the round up
            self._place = 0
            for _ in range(-self._n_streams % self._n_workers):
                next(self._rows)
        if isinstance(item, ConfigError):
            raise item
        return item
