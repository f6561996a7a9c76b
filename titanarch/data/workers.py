"""Loader processes. torchdata's StatefulDataLoader is their pool; the state of a run is never theirs."""

import multiprocessing
import warnings
import weakref
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from titanarch.config.errors import ConfigError
from titanarch.data.batch import Windows
from titanarch.data.layout import RowLayout
from titanarch.data.mixed_streams import MixedStreamReader, MixedStreamRow
from titanarch.data.orphans import exit_with_parent, outlive_signals
from titanarch.data.rows import RunRows
from titanarch.data.streams import StreamReader, StreamRow

NEVER = 1 << 40  # steps between the pool's own snapshots, which nothing reads


def _as_it_is(item: Any) -> Any:
    """The pool's collate function: its own would turn arrays into tensors."""
    return item


def _begin(worker: int) -> None:
    """What a worker does first."""
    exit_with_parent(worker)
    outlive_signals()


def _start_method() -> BaseContext:
    """A server that imports this module once and forks: a fork of the trainer may copy a lock that a thread holds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class _FirstRows(Sampler[int]):
    """The first row of each micro-batch from one on, to step ``until_step`` or for ever."""

    def __init__(self, layout: RowLayout, *, step: int, micro_batch: int, until_step: int | None) -> None:
        self._layout, self._step, self._micro_batch, self._until_step = layout, step, micro_batch, until_step

    def __iter__(self) -> Iterator[int]:
        step, micro_batch = self._step, self._micro_batch
        while step != self._until_step:
            yield self._layout.first_row(step, micro_batch)
            micro_batch += 1
            if micro_batch == self._layout.accumulation_steps:
                step, micro_batch = step + 1, 0


class _IndexedDataset(Dataset[Windows]):
    def __init__(self, rows: RunRows, n_rows: int) -> None:
        self._rows, self._n_rows = rows, n_rows

    def __getitem__(self, first_row: int) -> Windows:
        return self._rows.read(first_row, self._n_rows)


class _Pool:
    """What a data set gives, from processes. ``close`` ends them; they end with this object or the program too."""

    def __init__(self, dataset: Dataset[Any], *, n_workers: int, prefetch_factor: int, sampler: Sampler[int] | None = None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a deprecated call inside, and its guess of a good number of workers
            items = iter(
                StatefulDataLoader(
                    dataset,
                    batch_size=None,
                    sampler=sampler,
                    num_workers=n_workers,
                    prefetch_factor=prefetch_factor,
                    collate_fn=_as_it_is,
                    worker_init_fn=_begin,
                    snapshot_every_n_steps=NEVER,
                    multiprocessing_context=_start_method(),
                )
            )
        self._items = items
        # There is no public way to end the processes, and left to the garbage collector each may take 5 seconds.
        self.close = weakref.finalize(self, items._shutdown_workers)

    def next(self) -> Any:
        return next(self._items)


class IndexedWorkers:
    """Processes that read the micro-batches of a rank from one on, to step ``until_step`` or for ever.

    Plain arrays are cheaper to hand over than a Batch.
    """

    def __init__(self, rows: RunRows, layout: RowLayout, *, step: int, micro_batch: int, until_step: int | None, n_workers: int) -> None:
        sampler = _FirstRows(layout, step=step, micro_batch=micro_batch, until_step=until_step)
        self._pool = _Pool(_IndexedDataset(rows, layout.local_batch_size), n_workers=n_workers, prefetch_factor=2, sampler=sampler)

    def next(self) -> Windows:
        return self._pool.next()

    def close(self) -> None:
        self._pool.close()


class _StreamDataset(IterableDataset[Any]):
    """Worker w of W serves every W-th stream of the rank, beginning with the w-th.

    The pool asks its workers in turn, so a round over the streams is filled up with None to a multiple of W. What is
    wrong with the data is handed over as a value: the pool would wrap the exception in a traceback.
    """

    def __init__(self, reader: StreamReader | MixedStreamReader) -> None:
        self._reader = reader

    def __iter__(self) -> Iterator[StreamRow | MixedStreamRow | ConfigError | None]:
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

    def __init__(self, reader: StreamReader | MixedStreamReader, n_workers: int) -> None:
        self._n_streams, self._n_workers = len(reader.streams), n_workers
        self._pool = _Pool(_StreamDataset(reader), n_workers=n_workers, prefetch_factor=max(2, self._n_streams // n_workers))
        self._place = 0

    def next_row(self, stream: int, into: np.ndarray | None = None) -> Any:
        """The next row, a StreamRow or MixedStreamRow, which the caller knows to be of ``stream``; ``into`` gets its tokens too."""
        item = self._pool.next()
        if isinstance(item, ConfigError):
            raise item
        if into is not None:
            into[:] = (item.row if isinstance(item, MixedStreamRow) else item).tokens
        self._place += 1
        if self._place == self._n_streams:  # the None that fill the round up
            self._place = 0
            for _ in range(-self._n_streams % self._n_workers):
                self._pool.next()
        return item

    def close(self) -> None:
        self._pool.close()
