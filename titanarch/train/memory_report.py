"""What a run says when memory runs out: how much there was, what it was for, and which keys would make it fit."""

from pathlib import Path

import torch

from titanarch.parallel.mesh import resolve_degrees
from titanarch.train.local_batch import MemoryPlanner, free_bytes
from titanarch.train.metrics.memory import GIB, process_gib
from titanarch.train.processes import Processes
from titanarch.train.resolve import local_batch_size
from titanarch.train.run_config import RunConfig

REPORT_FILE = "out_of_memory.txt"
CPU_ALLOCATOR = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
"""How the CPU's allocator, which raises a plain RuntimeError, begins."""


class OutOfMemory(RuntimeError):
    """Memory ran out; the message is the report."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an allocator's: that of a GPU, of torch on the CPU, or Python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in CPU_ALLOCATOR)


def memory_report(
    error: BaseException, config: RunConfig, processes: Processes, *, folder: Path, planner: MemoryPlanner | None
) -> OutOfMemory:
    """The report of ``error`` in a run of the resolved ``config``.

    Several processes run out together: the first to write the report into ``folder`` has it planned, the others point to it.
    """
    rows = local_batch_size(config, resolve_degrees(config.parallelism, processes.world_size).data_parallel)
    lines = [
        f"process {processes.rank} of {processes.world_size} ran out of memory, with {rows} rows of "
        f"{config.training.seq_len} tokens at a time",
        f"  {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        *_measured(processes.device),
    ]
    path = folder / REPORT_FILE
    try:
        with open(path, "x") as file:
            if planner is not None:
                capacity = capacity_bytes(processes.device)
                lines.append(
                    planner.advice(config, world_size=processes.world_size, device_type=processes.device.type, capacity_bytes=capacity)
                )
            file.write("\n".join(lines) + "\n")
    except FileExistsError:
        lines.append(f"memory by category, and what would fit: {path}")
    return OutOfMemory("\n".join(lines))


def capacity_bytes(device: torch.device) -> float:
    """What a process of this run may fill once it starts anew: what is free, and what this process holds."""
    if device.type == "cuda":
        return free_bytes(device) + torch.cuda.memory_reserved(device)
    return free_bytes(device) + process_gib() * GIB


def _measured(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return [f"measured: {process_gib():.2f} GiB resident in this process"]
    allocated, peak, reserved = (
        f(device) / GIB for f in (torch.cuda.memory_allocated, torch.cuda.max_memory_allocated, torch.cuda.memory_reserved)
    )
    total = torch.cuda.mem_get_info(device)[1] / GIB
    return [f"measured: {allocated:.2f} GiB allocated, at most {peak:.2f}; {reserved:.2f} reserved of {total:.2f} GiB"]
