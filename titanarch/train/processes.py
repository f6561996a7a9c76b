"""The processes of a run: devices, the default process group, time-outs."""

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from titanarch.config.errors import ConfigError
from titanarch.ops import rocm
from titanarch.parallel.config import CommConfig
from titanarch.train.launchers import Place, find_place
from titanarch.train.meeting import agree
from titanarch.train.watch import Watch

RECORDED_COLLECTIVES = 2000
"""How many of the last collectives of NCCL torch remembers, for what a hang leaves behind."""


@dataclass(frozen=True)
class Processes:
    """``rank`` of ``world_size``, the device of this process, and the watch over the others, which is not started here."""

    rank: int
    world_size: int
    device: torch.device
    watch: Watch = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "watch", Watch(self.rank, self.world_size))

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
    """Join the processes that a launcher started (``titanarch.train.launchers`` lists them), or be the only one.

    The variables that torch reads are set in the environment where the launcher has others. Raises ConfigError where the
    launcher says too little, or starts more processes than the node has GPUs.
    """
    place = find_place(os.environ)
    kind = device_type()
    if torch.version.hip is not None and kind == "cuda":
        rocm.prepare(torch.cuda.get_device_properties(0).gcnArchName, os.environ)
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, _gpu(place, torch.cuda.device_count()))
    if kind == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED_COLLECTIVES))
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    timeout = timedelta(seconds=config.init_timeout_seconds)
    if place is None:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        alone = Processes(0, 1, device)
        alone.watch.start()
        return alone
    os.environ.update(place.variables())
    store = _store(place, timeout)
    name = agree(store, place.rank, place.world_size, seconds=config.init_timeout_seconds)
    dist.init_process_group(
        backend, store=PrefixStore(f"titanarch/{name}", store), rank=place.rank, world_size=place.world_size, timeout=timeout
    )
    processes = Processes(place.rank, place.world_size, device)
    processes.watch.start((place.address, place.port), name)
    return processes


def _store(place: Place, timeout: timedelta) -> TCPStore:
    """The store that the processes meet at: torchrun's, or one that process 0 holds."""
    holds = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    return TCPStore(place.address, place.port, is_master=holds, timeout=timeout, wait_for_workers=False)


def _gpu(place: Place | None, n_gpus: int) -> int:
    """The GPU of this process; schedulers may show each process one of its own."""
    local_rank = 0 if place is None else place.local_rank
    if local_rank < n_gpus:
        return local_rank
    if n_gpus == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0
    raise ConfigError(
        f"process {local_rank} of this node has no GPU: there are {n_gpus}; start as many processes a node (NGPU) as it has GPUs"
    )


def set_timeout(seconds: float) -> None:
    """How long a collective waits from now on, in every group of this process."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def stop_processes(processes: Processes | None = None) -> None:
    """Leave the process group; ``processes`` are those that ``start_processes`` gave."""
    if processes is not None:
        processes.watch.close()
    if dist.is_initialized():
        dist.destroy_process_group()
