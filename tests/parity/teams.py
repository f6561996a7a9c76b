"""Teams of processes that run cells of the matrix, one after the other, without starting anew."""

import functools
import gc
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Literal

import torch
import torch._inductor.config
import torch.distributed as dist
from pydantic import ValidationError
from torch._C._distributed_c10d import FileStore

import titanarch.train.setup
from tests.distributed import CONTEXT
from tests.parity.columns import Column
from tests.parity.rows import Row
from tests.parity.trial import Outcome, run_trial
from titanarch.config.errors import ConfigError
from titanarch.parallel.mesh import build_mesh

CELL_SECONDS = 900.0
"""How long a cell may take before its team is ended."""


@dataclass(frozen=True)
class Reply:
    """``outcome``: of a cell that ran. ``text``: why it was refused, or the traceback of what failed.

    ``processor_seconds``: spent by all processes of the cell, which other work on the machine does not change.
    """

    state: Literal["ran", "refused", "failed"]
    outcome: Outcome | None = None
    text: str = ""
    processor_seconds: float = 0.0


@dataclass(frozen=True)
class Task:
    """A cell to run, in ``float32`` or ``float64``."""

    row: Row
    column: Column
    dtype: str


class Team:
    """``n`` processes with a gloo group of their own. A cell that fails ends them, and the next one starts others."""

    def __init__(self, n: int, dtype: str) -> None:
        self.n, self.dtype = n, dtype
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, row: Row, column: Column) -> Reply:
        if self._folder is None:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((row, column, self.dtype)))
        reply = self._reply()
        if reply.state == "failed":
            self.close(kill=True)
        return reply

    def close(self, *, kill: bool = False) -> None:
        if self._folder is None:
            return
        for pipe in self._pipes:
            pipe.close()  # reads as end of file, at which a process ends by itself
        for process in self._processes:
            if not kill:
                process.join(10.0)
            if process.is_alive():
                process.kill()
            process.join()
        self._folder.cleanup()
        self._folder = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rendezvous-")
        pairs = [CONTEXT.Pipe() for _ in range(self.n)]
        store = str(Path(self._folder.name, "store"))
        self._pipes: list[Connection] = [ours for ours, _ in pairs]
        self._processes = [
            CONTEXT.Process(target=_serve, args=(rank, self.n, store, theirs), daemon=True) for rank, (_, theirs) in enumerate(pairs)
        ]
        for process, (_, theirs) in zip(self._processes, pairs, strict=True):
            process.start()
            theirs.close()

    def _reply(self) -> Reply:
        """That of process 0, or of the first that failed."""
        waiting, first, spent = dict(enumerate(self._pipes)), Reply("failed"), 0.0
        deadline = time.monotonic() + CELL_SECONDS
        while waiting:
            ready = connection.wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                return Reply("failed", text=f"processes {sorted(waiting)} had not finished in {CELL_SECONDS:g} s")
            for rank, pipe in list(waiting.items()):
                if pipe in ready:
                    try:
                        reply: Reply = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        reply = Reply("failed", text="it died without a word")
                    if reply.state == "failed":
                        return Reply("failed", text=f"process {rank}: {reply.text}")
                    first, spent = reply if rank == 0 else first, spent + reply.processor_seconds
                    del waiting[rank]
        return replace(first, processor_seconds=spent)


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    """The life of one process of a team."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch._inductor.config.compile_threads = 1  # in this process: a cell that is ended must leave no compiler behind
    timeout = timedelta(seconds=CELL_SECONDS)
    dist.init_process_group("gloo", store=FileStore(store, world_size), rank=rank, world_size=world_size, timeout=timeout)
    # Cells share meshes: every group that a mesh makes keeps threads that wake a hundred times a second.
    titanarch.train.setup.build_mesh = functools.cache(build_mesh)
    gc.collect()
    gc.freeze()  # what is imported stays: it need not be walked after every cell
    while True:
        try:
            row, column, dtype = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        started = time.process_time()
        try:
            reply = Reply("ran", run_trial(row, column, dtype))
        except (ConfigError, ValidationError) as error:
            reply = Reply("refused", text=_refusal(error))
        except Exception:
            reply = Reply("failed", text=traceback.format_exc())
        pipe.send_bytes(pickle.dumps(replace(reply, processor_seconds=time.process_time() - started)))


def _refusal(error: ConfigError | ValidationError) -> str:
    if isinstance(error, ConfigError):
        return "; ".join(map(str, error.problems))
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def run_cells(cells: Sequence[Task], *, n_processes: int, report: Callable[[Task, Reply], None]) -> None:
    """Run all cells, those of one process first, on at most ``n_processes`` processes at a time.

    ``report`` is called with each reply, from one thread at a time.
    """
    lock = threading.Lock()

    def work(todo: SimpleQueue[Task], n: int, dtype: str) -> None:
        team = Team(n, dtype)
        try:
            while True:
                task = todo.get_nowait()
                reply = team.run(task.row, task.column)
                with lock:
                    report(task, reply)
        except Empty:
            return
        finally:
            team.close()

    kinds = {(task.column.n_processes, task.dtype) for task in cells}
    for n, dtype in sorted(kinds, key=lambda kind: (kind[0], kind[1] != "float64")):  # what is compared with comes first
        todo: SimpleQueue[Task] = SimpleQueue()
        for task in cells:
            if (task.column.n_processes, task.dtype) == (n, dtype):
                todo.put(task)
        threads = [threading.Thread(target=work, args=(todo, n, dtype)) for _ in range(max(1, min(n_processes // n, todo.qsize())))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
