"""The ledger of a run: which rows each step was really fed, as each process saw them.

``ledger/start-00001/process-00000.jsonl`` is written by one process of one start and only ever appended to. Its first line is a
header; then comes a line a step, after it was computed, and a line where the run went back to a checkpoint::

    {"ledger": 2, "start": 1, "after_step": 0, "process": 0, "n_processes": 2, "data_rank": 0, ...}
    {"step": 1, "made": true, "rows": [[0, 0, 0, 17, 2868947201], ...]}
    {"rolled_back_to": 0}

A row is its number in the run, the numbers of its origin (``Origins``) and the CRC-32 of its tokens and labels. ``made``: whether
the optimizer made the step. Nothing is ever taken out: a start that goes on after step c supersedes what earlier starts wrote of
later steps, and a last line that a kill cut off is none. ``ledger_check`` reads it. Headers of version 1 lack ``n_parts``, which was 1.
"""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from titanarch.data.batch import Batch
from titanarch.data.errors import data_error

FOLDER = "ledger"
VERSION = 2
READABLE = (1, VERSION)  # version 1 lacks Origins.n_parts
INDEXED = ("source", "epoch", "window")
PARTS = ("part", "n_parts")
STREAMED = ("epoch", "document", "token", "next_epoch", "next_document", "next_token")


@dataclass(frozen=True)
class Origins:
    """Where the rows of a loader come from.

    ``windows``: of indexed data, how many each source has, by its name; their rows have a source (its place in ``windows``), an
    epoch and a window. Where rows have different lengths, ``n_parts`` is above 1 and a row is one of equal parts of its window; it
    has then the part's number, from 0, and how many there are, which divides ``n_parts``.

    ``n_streams``: of streamed data; row k is of stream k mod n_streams, and has the place (pass, document, token) where the stream
    stood before it and after it; by best fit (pass, first document of the group, rows of the group behind). Of a mixture that is
    streamed, ``windows`` names the sources, without their windows, and the place is preceded by the source.
    """

    windows: dict[str, int] = field(default_factory=dict)
    n_streams: int = 0
    n_parts: int = 1

    @property
    def columns(self) -> tuple[str, ...]:
        """The numbers of a row's origin."""
        if not self.n_streams:
            return INDEXED if self.n_parts == 1 else (*INDEXED, *PARTS)
        return ("source", *STREAMED) if self.windows else STREAMED


@dataclass(frozen=True)
class LedgerHeader:
    """Who writes a file. ``start``: of the run, from 1. ``after_step``: the last step that was done when it started.

    Processes with the same ``data_rank`` are fed the same rows; ranks 0 to ``data_parallel`` - 1 have all.
    """

    start: int
    after_step: int
    process: int
    n_processes: int
    data_rank: int
    data_parallel: int
    micro_batch: int
    workers: int
    origins: Origins

    def to_json(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name != "origins"}
        return {"ledger": VERSION, **own, **vars(self.origins)}


class Ledger:
    """Appends to the file of one process of one start; each line is one unbuffered write, so a kill tears the last one at most.

    All methods raise DataError where the file cannot be written.
    """

    def __init__(self, run_folder: Path, header: LedgerHeader) -> None:
        """Raises DataError where the start has a file already."""
        self.path = file_of(run_folder, header.start, header.process)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor: int | None = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._failed(error) from error
        self._append(header.to_json())

    def step(self, step: int, batches: Sequence[Batch], *, made: bool) -> None:
        """Step number ``step`` was computed on ``batches``, which lie on the host; ``made``: the optimizer made it."""
        self._append({"step": step, "made": made, "rows": [row for batch in batches for row in _rows_of(batch)]})

    def rolled_back(self, step: int) -> None:
        """The run went back to the checkpoint of ``step``; the rows of later steps are left out from now on."""
        self._append({"rolled_back_to": step})

    def sync(self) -> None:
        """What was written is on the disk when this returns; to be called before a checkpoint of it is committed."""
        assert self._descriptor is not None, "the ledger is open"
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """A second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, record: dict[str, Any]) -> None:
        assert self._descriptor is not None, "the ledger is open"
        line = (json.dumps(record, separators=(",", ":")) + "\n").encode()
        try:
            n_written = os.write(self._descriptor, line)
        except OSError as error:
            raise self._failed(error) from error
        if n_written != len(line):
            raise data_error("the disk is full: make room and start again, the same command resumes", file=self.path)

    def _failed(self, error: OSError) -> Exception:
        message = f"the ledger of rows cannot be written: {error.strerror or error}"
        remedy = "make room or permit writing there, or set data.ledger = false; the same command then resumes"
        return data_error(f"{message}; {remedy}", file=self.path, key="data.ledger")


def file_of(run_folder: Path, start: int, process: int) -> Path:
    """The file of one process of one start."""
    return run_folder / FOLDER / f"start-{start:05d}" / f"process-{process:05d}.jsonl"


def _rows_of(batch: Batch) -> list[list[int]]:
    """Number, origin and checksum of each row of a batch on the host."""
    assert batch.origin_BI is not None, "a training loader says where its rows come from"
    checksums = [
        zlib.crc32(labels.tobytes(), zlib.crc32(tokens.tobytes()))
        for tokens, labels in zip(batch.tokens_BT.numpy(), batch.labels_BT.numpy(), strict=True)
    ]
    return np.column_stack([batch.row_B.numpy(), batch.origin_BI, checksums]).tolist()
