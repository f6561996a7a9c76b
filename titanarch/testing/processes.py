"""Run a function on several gloo processes of this machine, and bring back what each returned."""

import gc
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

Result = TypeVar("Result")

PRELOADED = ("titanarch.train.trainer", "torch._dynamo")
"""The whole package, and what torch imports late."""


@cache
def context() -> ForkServerContext:
    """How processes are started: as forks of a server that has imported torch and titanarch, which takes seconds, once a session.

    The server has done nothing else: it has no threads of Python, no process group, no CUDA context.
    """
    forks = get_context("forkserver")
    forks.set_forkserver_preload(list(PRELOADED))
    return forks


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message holds its traceback."""


def run_distributed(fn: Callable[..., Result], world_size: int, *args: Any, timeout_seconds: float = 180.0) -> list[Result]:
    """``fn(*args)`` on ``world_size`` fresh processes with one thread each; what each returned, by rank.

    ``fn`` is a function of a module (the processes import it), finds its rank through ``torch.distributed``,
    whose gloo default group is ready, and returns something picklable; a tensor comes back as a copy (a DTensor
    must be made plain first). The environment is the caller's, with RANK, LOCAL_RANK and WORLD_SIZE set. The first
    rank that fails ends the others and is raised as RankError; so is running longer than ``timeout_seconds``.
    """
    forks = context()
    with tempfile.TemporaryDirectory(prefix="rendezvous-") as folder:
        pipes = [forks.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            forks.Process(
                target=_rank_main,
                args=(fn, args, rank, world_size, str(Path(folder, "store")), timeout_seconds, dict(os.environ), pipes[rank][1]),
                daemon=False,  # a rank may start processes of its own (data workers)
            )
            for rank in range(world_size)
        ]
        try:
            for process, (_, writer) in zip(processes, pipes, strict=True):
                process.start()
                writer.close()  # the child's copy is the only one left, so its death reads as end of file
            results = _collect([reader for reader, _ in pipes], time.monotonic() + timeout_seconds)
            for process in processes:
                process.join(10.0)
            return results
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
            for reader, _ in pipes:
                reader.close()


def _collect(readers: list[Connection], deadline: float) -> list[Any]:
    """One result a reader; the first failure raises."""
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        waiting = {reader: rank for rank, reader in enumerate(readers) if rank not in results}
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} had not finished in time")
        failures = []
        for reader in ready:
            assert isinstance(reader, Connection), "only pipes are waited for"
            rank = waiting[reader]
            try:
                failed, payload = pickle.loads(reader.recv_bytes())
            except EOFError:
                failed, payload = True, "it died without a word\n"
            if failed:
                failures.append(f"rank {rank} failed:\n{payload}")
            results[rank] = payload
        if failures:  # what one rank raises breaks the collectives of the others: show all that came together
            raise RankError("\n".join(failures))
    return [results[rank] for rank in range(len(readers))]


def _rank_main(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    store_path: str,
    timeout_seconds: float,
    environment: dict[str, str],
    writer: Connection,
) -> None:
    """The life of one rank: join the group, call, send (failed, result or traceback)."""
    gc.freeze()  # what the server has imported is no garbage, and to look through it takes longer than a step
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host name need not resolve
    try:
        dist.init_process_group(
            "gloo",
            store=FileStore(store_path, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        result = fn(*args)
        if dist.is_initialized():
            dist.destroy_process_group()
        message = pickle.dumps((False, result))
    except BaseException:  # noqa: BLE001 (whatever it is, the caller must see it)
        message = pickle.dumps((True, traceback.format_exc()))
    writer.send_bytes(message)
    writer.close()
