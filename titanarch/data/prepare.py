"""From text to the indexed format, in parallel; the result does not depend on the number of processes."""

import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from titanarch.data.errors import data_error
from titanarch.data.index_writer import IndexWriter, token_dtype
from titanarch.data.orphans import exit_with_parent
from titanarch.data.sources import Document
from titanarch.data.split import SplitSource
from titanarch.data.tokenizers import Tokenizer

CHUNK_CHARACTERS = 1 << 20  # text handed to a process at a time, or one document that is longer
CHUNK_DOCUMENTS = 1024
CHUNKS_A_PROCESS = 3  # read ahead, so that no process waits for the reader
SECONDS_A_LINE = 30
PARALLEL_BYTES = 64 << 20  # below, starting processes takes longer than tokenizing


class _Tokens(NamedTuple):
    """The tokens of a chunk's documents in one array, their lengths, and the bytes of their texts."""

    tokens: np.ndarray
    lengths: list[int]
    n_bytes: list[int]


def prepare(source: SplitSource, tokenizer: Tokenizer, folder: Path, *, processes: int = 0) -> None:
    """Tokenize the documents of ``source`` into ``folder``, an existing empty one.

    ``processes``: 0 takes one a core where the source has over 64 MB and else one. A progress bar goes to a terminal
    on stderr. Raises DataError where a document is malformed, or there is none, naming file and line.
    """
    total = source.source.stored_bytes
    n_processes = processes or (available_cores() if total > PARALLEL_BYTES else 1)
    with IndexWriter(folder, tokenizer) as writer, _Progress(f"tokenizing {source.split}", total) as progress:
        tokenized = _in_parallel(source, tokenizer, n_processes) if n_processes > 1 else _here(source, tokenizer)
        for documents, chunk in tokenized:
            ends = np.cumsum(chunk.lengths)
            for document_id, end, length, n_bytes in zip(documents, ends, chunk.lengths, chunk.n_bytes, strict=True):
                writer.add(document_id, chunk.tokens[end - length : end], n_bytes)
            progress.show(source.source.stored_bytes_read)
        if writer.n_bytes == 0:
            raise source.empty()
        writer.finish(source.identity(), source.source.skips.files)


def available_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class _Progress:
    """A bar on a terminal, a line every half a minute elsewhere, on stderr."""

    def __init__(self, what: str, total_bytes: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
        self._task = self._bar.add_task(what, total=total_bytes)
        self._what, self._total_bytes, self._last = what, total_bytes, time.monotonic()

    def show(self, done_bytes: int) -> None:
        self._bar.update(self._task, completed=done_bytes)
        if self._bar.disable and time.monotonic() - self._last >= SECONDS_A_LINE:
            self._last = time.monotonic()
            print(f"{self._what}: {done_bytes / max(1, self._total_bytes):.0%} of {self._total_bytes:,} bytes", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def _chunks(source: SplitSource) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    n_characters = 0
    for record in source.records():
        chunk.append(source.document(record))
        n_characters += len(chunk[-1].text)
        if n_characters >= CHUNK_CHARACTERS or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk
            chunk, n_characters = [], 0
    if chunk:
        yield chunk


def _tokenize(tokenizer: Tokenizer, texts: list[str]) -> _Tokens:
    tokens = [tokenizer.encode(text) for text in texts]
    joined = np.concatenate(tokens).astype(token_dtype(tokenizer.vocab_size))
    return _Tokens(joined, [len(ids) for ids in tokens], [len(text.encode()) for text in texts])


def _here(source: SplitSource, tokenizer: Tokenizer) -> Iterator[tuple[list[str], _Tokens]]:
    for chunk in _chunks(source):
        yield [document.id for document in chunk], _tokenize(tokenizer, [document.text for document in chunk])


_tokenizer: Tokenizer  # of a worker process


def _start_worker(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    exit_with_parent()


def _tokenize_in_worker(texts: list[str]) -> _Tokens:
    return _tokenize(_tokenizer, texts)


def _in_parallel(source: SplitSource, tokenizer: Tokenizer, n_processes: int) -> Iterator[tuple[list[str], _Tokens]]:
    """As ``_here``, in the same order. Fresh processes, because a fork may copy a lock that a thread holds."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, mp_context=context, initializer=_start_worker, initargs=(tokenizer,)) as pool:
        waiting: deque[tuple[list[str], Future[_Tokens]]] = deque()
        try:
            for chunk in _chunks(source):
                texts = [document.text for document in chunk]
                waiting.append(([document.id for document in chunk], pool.submit(_tokenize_in_worker, texts)))
                if len(waiting) > CHUNKS_A_PROCESS * n_processes:
                    ids, future = waiting.popleft()
                    yield ids, future.result()
            while waiting:
                ids, future = waiting.popleft()
                yield ids, future.result()
        except BrokenProcessPool as error:
            raise data_error("a tokenizing process died, likely for want of memory: use fewer processes", key="data.processes") from error
        finally:
            pool.shutdown(cancel_futures=True)
