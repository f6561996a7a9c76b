"""The device mesh of a run: axes dp_replicate and dp_shard, outer to inner."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titanarch.config.errors import ConfigError, Problem
from titanarch.parallel.config import ParallelismConfig

DATA_AXES = ("dp_replicate", "dp_shard")


@dataclass(frozen=True)
class Degrees:
    """How many processes each axis has."""

    dp_replicate: int
    dp_shard: int

    @property
    def data_parallel(self) -> int:
        return self.dp_replicate * self.dp_shard


def resolve_degrees(config: ParallelismConfig, world_size: int) -> Degrees:
    """The degree of each axis on ``world_size`` processes; one ConfigError with every conflict."""
    problems = [
        Problem(f"{degree} is not available in this version: use 1", f"parallelism.{key}")
        for key, degree in (
            ("tensor_parallel_degree", config.tensor_parallel_degree),
            ("context_parallel_degree", config.context_parallel_degree),
        )
        if degree > 1
    ]
    if config.pipeline_parallel_degree > 1:
        reason = f"{config.pipeline_parallel_degree}: there is no pipeline parallelism, since a stage cannot hold every architecture; use 1"
        problems.append(Problem(reason, "parallelism.pipeline_parallel_degree"))
    replicate, shard = config.data_parallel_replicate_degree, config.data_parallel_shard_degree
    if shard == -1 and world_size % replicate:
        message = f"{replicate} does not divide the {world_size} processes; use a divisor"
        problems.append(Problem(message, "parallelism.data_parallel_replicate_degree"))
    elif shard == 0 or (shard > 0 and replicate * shard != world_size):
        message = f"{shard} x data_parallel_replicate_degree {replicate} is not the number of processes, {world_size}; use -1 for the rest"
        problems.append(Problem(message, "parallelism.data_parallel_shard_degree"))
    if problems:
        raise ConfigError(*problems)
    return Degrees(replicate, world_size // replicate if shard == -1 else shard)


def build_mesh(degrees: Degrees, device_type: str) -> DeviceMesh:
    """A mesh over all processes; torch.distributed is initialized."""
    assert degrees.data_parallel == dist.get_world_size(), "resolve_degrees checks this"
    return init_device_mesh(device_type, (degrees.dp_replicate, degrees.dp_shard), mesh_dim_names=DATA_AXES)
