"""From text to the indexed format, in parallel; the result does not depend on the number of processes."""

import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from titanarch.data.card import inputs_of
from titanarch.data.errors import data_error
from titanarch.data.index_writer import IndexWriter, token_dtype
from titanarch.data.orphans import exit_with_parent
from titanarch.data.skips import Skip
from titanarch.data.sources import Document
from titanarch.data.split import Record, SplitSource
from titanarch.data.tokenizers import Tokenizer
from titanarch.data.unfinished import PROGRESS, Done, load_progress, save_progress

CHUNK_CHARACTERS = 1 << 20  # text handed to a process at a time, or one document that is longer
CHUNK_DOCUMENTS = 1024
COMMIT_TOKENS = 32 << 20  # between two points that an interrupted preparation can go on from: seconds of tokenizing on many cores
CHUNKS_A_PROCESS = 3  # read ahead, so that no process waits for the reader
SECONDS_A_LINE = 30
PARALLEL_BYTES = 64 << 20  # below, starting processes takes longer than tokenizing


class _Chunk(NamedTuple):
    """Documents that follow each other. ``last``: the last one; ``passed_over``: those of other splits up to there; ``skips``: what
    could not be read up to there."""

    ids: list[str]
    texts: list[str]
    last: Record
    passed_over: int
    skips: list[Skip]


class _Tokens(NamedTuple):
    """The tokens of a chunk's documents in one array, their lengths, and the bytes of their texts."""

    tokens: np.ndarray
    lengths: list[int]
    n_bytes: list[int]


def prepare(source: SplitSource, tokenizer: Tokenizer, folder: Path, *, processes: int = 0, resumes: bool = False) -> None:
    """Tokenize the documents of ``source`` into ``folder``, an existing empty one.

    ``resumes``: or one where this was broken off, of the same source and tokenizer, which the caller knows: go on, to the same bytes.

    ``processes``: 0 takes one a core where the source has over 64 MB and else one. A progress bar goes to a terminal
    on stderr. Raises DataError where a document is malformed, or there is none, naming file and line.
    """
    total = source.source.stored_bytes
    n_processes = processes or (available_cores() if total > PARALLEL_BYTES else 1)
    if resumes and (folder / "meta.json").is_file():
        (folder / PROGRESS).unlink(missing_ok=True)
        return
    done = load_progress(folder) if resumes else None
    if done is not None:
        print(f"tokenizing {source.split}: goes on after {done.written.documents:,} documents", file=sys.stderr)
    written = None if done is None else done.written
    with IndexWriter(folder, tokenizer, written=written) as writer, _Progress(f"tokenizing {source.split}", total) as progress:
        chunks, committed = _chunks(source, done), writer.n_tokens
        tokenized = _in_parallel(chunks, tokenizer, n_processes) if n_processes > 1 else _here(chunks, tokenizer)
        for chunk, tokens in tokenized:
            ends = np.cumsum(tokens.lengths)
            for document_id, end, length, n_bytes in zip(chunk.ids, ends, tokens.lengths, tokens.n_bytes, strict=True):
                writer.add(document_id, tokens.tokens[end - length : end], n_bytes)
            if resumes and writer.n_tokens - committed >= COMMIT_TOKENS:
                save_progress(folder, writer.commit(), chunk.last, chunk.passed_over, chunk.skips)
                committed = writer.n_tokens
            progress.show(source.source.stored_bytes_read)
        if writer.n_bytes == 0:
            raise source.empty()
        skips = source.source.skips.files
        writer.finish(source.identity(), inputs=inputs_of(source), skipped=skips, of_other_splits=source.passed_over)
    (folder / PROGRESS).unlink(missing_ok=True)


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


def _chunks(source: SplitSource, done: Done | None) -> Iterator[_Chunk]:
    """The documents after those that are done."""
    source.passed_over = 0 if done is None else done.passed_over
    source.source.skips.restore([] if done is None else done.skips)
    records = source.records() if done is None else islice(source.records(done.last), 1, None)
    documents: list[Document] = []
    n_characters, last = 0, None
    for record in records:
        documents.append(source.document(record))
        last = record._replace(content=None)
        n_characters += len(documents[-1].text)
        if n_characters >= CHUNK_CHARACTERS or len(documents) >= CHUNK_DOCUMENTS:
            yield _chunk(documents, last, source)
            documents, n_characters = [], 0
    if documents and last is not None:
        yield _chunk(documents, last, source)


def _chunk(documents: Sequence[Document], last: Record, source: SplitSource) -> _Chunk:
    ids, texts = [document.id for document in documents], [document.text for document in documents]
    return _Chunk(ids, texts, last, source.passed_over, source.source.skips.files)


def _tokenize(tokenizer: Tokenizer, texts: list[str]) -> _Tokens:
    tokens = [tokenizer.encode(text) for text in texts]
    joined = np.concatenate(tokens).astype(token_dtype(tokenizer.vocab_size))
    return _Tokens(joined, [len(ids) for ids in tokens], [len(text.encode()) for text in texts])


def _here(chunks: Iterable[_Chunk], tokenizer: Tokenizer) -> Iterator[tuple[_Chunk, _Tokens]]:
    for chunk in chunks:
        yield chunk, _tokenize(tokenizer, chunk.texts)


_tokenizer: Tokenizer  # of a worker process


def _start_worker(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    exit_with_parent()


def _tokenize_in_worker(texts: list[str]) -> _Tokens:
    return _tokenize(_tokenizer, texts)


def _in_parallel(chunks: Iterable[_Chunk], tokenizer: Tokenizer, n_processes: int) -> Iterator[tuple[_Chunk, _Tokens]]:
    """As ``_here``, in the same order. Fresh processes, because a fork may copy a lock that a thread holds."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, mp_context=context, initializer=_start_worker, initargs=(tokenizer,)) as pool:
        waiting: deque[tuple[_Chunk, Future[_Tokens]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_tokenize_in_worker, chunk.texts)))
                if len(waiting) > CHUNKS_A_PROCESS * n_processes:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BrokenProcessPool as error:
            raise data_error("a tokenizing process died, likely for want of memory: use fewer processes", key="data.processes") from error
        finally:
            pool.shutdown(cancel_futures=True)
