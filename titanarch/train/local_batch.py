"""``training.local_batch_size = "auto"``: the largest micro-batch that fits, of those that divide the rows of a process.

The rows of a step and their order stay what they are; more or fewer of them share a forward.
"""

import os
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from titanarch.config.errors import ConfigError, Problem
from titanarch.parallel.mesh import resolve_degrees
from titanarch.train.processes import Processes
from titanarch.train.run_config import RunConfig

MEMINFO = Path("/proc/meminfo")
USABLE = 0.9
"""The share of the free memory that a run may fill."""


class MemoryPlanner(Protocol):
    """What predicts the memory of a run; above training in the order of the folders, so it is handed in."""

    def largest_rows(self, config: RunConfig, *, world_size: int, device_type: str, capacity_bytes: float) -> tuple[int, float]:
        """Rows of the largest micro-batch that fits, and its peak in bytes; 0 rows where not even one row fits."""

    def advice(self, config: RunConfig, *, world_size: int, device_type: str, capacity_bytes: float) -> str:
        """Predicted memory by category, and the smallest changes of keys that would fit; lines of text."""


def available_bytes(n_processes: int) -> float:
    """Memory of this machine that is free, for each of ``n_processes`` that share it."""
    if MEMINFO.exists():
        line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free / n_processes


def free_bytes(device: torch.device) -> float:
    """What this process may still allocate: of its GPU, or of the machine among the processes on it."""
    if device.type == "cuda":
        return USABLE * torch.cuda.mem_get_info(device)[0]
    return USABLE * available_bytes(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def row_choices(rows: int) -> list[int]:
    """The micro-batches that divide ``rows``, largest first."""
    return [n for n in range(rows, 0, -1) if rows % n == 0]


def with_local_batch(config: RunConfig, processes: Processes, planner: MemoryPlanner | None) -> tuple[RunConfig, str]:
    """``config`` with a number for ``auto``, and a sentence that says which; as it is, and nothing, where it has one.

    Collective: process 0 plans, for the process with the least memory. ConfigError where not one row fits.
    """
    if config.training.local_batch_size != "auto":
        return config, ""
    least = torch.tensor(free_bytes(processes.device), dtype=torch.float64, device=processes.device)
    if processes.world_size > 1:
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
    found = torch.zeros(2, dtype=torch.float64, device=processes.device)
    if processes.is_main:
        assert planner is not None, "a command that trains brings a planner"
        rows, peak = planner.largest_rows(
            config, world_size=processes.world_size, device_type=processes.device.type, capacity_bytes=least.item()
        )
        found = torch.tensor([rows, peak], dtype=torch.float64, device=processes.device)
    if processes.world_size > 1:
        dist.broadcast(found, src=0)
    rows, peak = int(found[0].item()), found[1].item()
    memory = f"predicted peak {peak / 2**30:.2f} GiB a process, {least.item() / 2**30:.2f} GiB are free"
    if rows == 0:
        raise ConfigError(Problem(f"not even one row fits ({memory}); see titanarch plan --suggest", "training.local_batch_size"))
    training = config.training.model_copy(update={"local_batch_size": rows})
    n = config.training.global_batch_size // (rows * resolve_degrees(config.parallelism, processes.world_size).data_parallel)
    note = f"local_batch_size = auto: {rows} rows at a time, {n} micro-batches a step ({memory})"
    return config.model_copy(update={"training": training}), note
