"""The processes of a run as a grid: axes dp_replicate, dp_shard, cp, tp, outer to inner."""

from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titanarch.config.errors import ConfigError, Problem
from titanarch.parallel.config import ParallelismConfig


@dataclass(frozen=True)
class Degrees:
    """How many processes each axis has."""

    dp_replicate: int
    dp_shard: int
    cp: int = 1
    tp: int = 1

    @property
    def data_parallel(self) -> int:
        """Processes, or groups of them, that read rows of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        return self.data_parallel * self.cp * self.tp

    @property
    def sequence(self) -> int:
        """What the tokens of a row must be a multiple of when each process has one part of it."""
        return self.cp * self.tp


def resolve_degrees(config: ParallelismConfig, world_size: int) -> Degrees:
    """The degree of each axis on ``world_size`` processes; one ConfigError with every conflict."""
    problems = []
    if config.pipeline_parallel_degree > 1:
        reason = f"{config.pipeline_parallel_degree}: there is no pipeline parallelism, since a stage cannot hold every architecture; use 1"
        problems.append(Problem(reason, "parallelism.pipeline_parallel_degree"))
    if config.expert_parallel_degree > 1:
        reason = (
            f"{config.expert_parallel_degree}: there is no expert parallelism, every process holds its share of all experts: FSDP divides "
            "their weights, tensor_parallel_degree the hidden units of each; use 1"
        )
        problems.append(Problem(reason, "parallelism.expert_parallel_degree"))
    replicate, shard = config.data_parallel_replicate_degree, config.data_parallel_shard_degree
    cp, tp = config.context_parallel_degree, config.tensor_parallel_degree
    others = replicate * cp * tp
    product = f"data_parallel_replicate_degree {replicate} x context_parallel_degree {cp} x tensor_parallel_degree {tp} = {others}"
    if shard == -1 and world_size % others:
        by_key = {"data_parallel_replicate_degree": replicate, "context_parallel_degree": cp, "tensor_parallel_degree": tp}
        key = max(by_key, key=lambda name: by_key[name])
        problems.append(Problem(f"{product} does not divide the {world_size} processes; use degrees that do", f"parallelism.{key}"))
    elif shard == 0 or (shard > 0 and others * shard != world_size):
        message = f"{shard} x {product} is not the number of processes, {world_size}; use -1 for the rest"
        problems.append(Problem(message, "parallelism.data_parallel_shard_degree"))
    if problems:
        raise ConfigError(*problems)
    return Degrees(replicate, world_size // others if shard == -1 else shard, cp, tp)


class Mesh:
    """The grid of a run, and this process's place in it; torch.distributed is initialized.

    ``weights``: axes dp_replicate, dp_shard_cp, tp, along which parameters lie (context parallelism shares them out as
    data parallelism does). ``rows``: axes dp, cp, tp, along which the batch lies.
    """

    def __init__(self, degrees: Degrees, device_type: str) -> None:
        assert degrees.world_size == dist.get_world_size(), "resolve_degrees checks this"
        self.degrees = degrees
        self.weights = init_device_mesh(
            device_type,
            (degrees.dp_replicate, degrees.dp_shard * degrees.cp, degrees.tp),
            mesh_dim_names=("dp_replicate", "dp_shard_cp", "tp"),
        )
        self.rows = init_device_mesh(device_type, (degrees.data_parallel, degrees.cp, degrees.tp), mesh_dim_names=("dp", "cp", "tp"))

    @cached_property
    def fsdp(self) -> DeviceMesh:
        """What FSDP2 divides over: one axis, or with HSDP two."""
        return self.weights["dp_shard_cp"] if self.degrees.dp_replicate == 1 else self.weights["dp_replicate", "dp_shard_cp"]

    @cached_property
    def tensor(self) -> DeviceMesh:
        """The axis of tensor parallelism."""
        return self.weights["tp"]

    @cached_property
    def tensor_group(self) -> ProcessGroup:
        return self.tensor.get_group()

    @cached_property
    def context_group(self) -> ProcessGroup:
        return self.rows["cp"].get_group()

    @property
    def data_rank(self) -> int:
        """Which rows this process reads, together with those that share their sequences or their heads with it."""
        return self.rows.get_local_rank("dp")

    def sum_over_data(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over the processes with other rows, in place."""
        if self.degrees.data_parallel > 1:
            dist.all_reduce(value, group=self.rows["dp"].get_group())
        return value


def build_mesh(degrees: Degrees, device_type: str) -> Mesh:
    """The grid over all processes."""
    return Mesh(degrees, device_type)
