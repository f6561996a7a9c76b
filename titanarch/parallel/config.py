"""[parallelism], [activation_checkpoint], [compile], [comm]: how a run is laid out. None of it changes the run."""

from typing import Annotated, Literal

from pydantic import Field

from titanarch.config.section import Section

Degree = Annotated[int, Field(ge=1)]


class ParallelismConfig(Section, identity=False):
    """[parallelism]: the degrees multiply to the number of processes."""

    data_parallel_replicate_degree: Degree = Field(1, description="groups of processes that each hold a whole copy (HSDP)")
    data_parallel_shard_degree: Annotated[int, Field(ge=-1)] = Field(-1, description="processes that share one copy (FSDP2); -1: the rest")
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = Field(
        "default", description="free gathered weights after the forward; default: in blocks, but not on one process"
    )
    tensor_parallel_degree: Degree = Field(1, description="processes that share the heads; above 1 is not in this version")
    context_parallel_degree: Degree = Field(1, description="processes that share a sequence; above 1 is not in this version")
    pipeline_parallel_degree: Degree = Field(1, description="must be 1: there is no pipeline parallelism")


class ActivationCheckpointConfig(Section, identity=False):
    """[activation_checkpoint]: recompute in the backward rather than keep."""

    mode: Literal["none", "full"] = Field("none", description="full: keep only each block's input")


class CompileConfig(Section, identity=False):
    """[compile]: torch.compile of each block."""

    enable: bool = Field(False, description="compile each block, fullgraph")


class CommConfig(Section, identity=False):
    """[comm]: collectives."""

    init_timeout_seconds: Annotated[int, Field(gt=0)] = Field(300, description="until the first step is done, seconds")
    train_timeout_seconds: Annotated[int, Field(gt=0)] = Field(100, description="from then on, seconds")
