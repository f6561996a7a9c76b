"""The processes of a run: devices, the default process group, time-outs."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from titanarch.parallel.config import CommConfig


@dataclass(frozen=True)
class Processes:
    """``rank`` of ``world_size``, and the device of this process."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value


def device_type() -> str:
    """cuda where there is a GPU (CUDA or ROCm), else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def start_processes(config: CommConfig) -> Processes:
    """Join the processes that the launcher started (RANK, WORLD_SIZE, LOCAL_RANK), or be the only one."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    kind = device_type()
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    timeout = timedelta(seconds=config.init_timeout_seconds)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    return Processes(rank, world_size, device)


def set_timeout(seconds: float) -> None:
    """How long a collective waits from now on, in every group of this process."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def stop_processes() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
