"""[parallelism], [activation_checkpoint], [compile], [comm]: how a run is laid out. [quantize] alone changes the run."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from titanarch.config.section import FREE, ListOf, Section

Degree = Annotated[int, Field(ge=1)]
Method = Literal["auto", "heads", "gather", "ring", "state"]
LoadBalance = Literal["auto", "contiguous", "head_tail"]


class ParallelismConfig(Section, identity=False):
    """[parallelism]: the degrees multiply to the number of processes."""

    data_parallel_replicate_degree: Degree = Field(1, description="groups of processes that each hold a whole copy (HSDP)")
    data_parallel_shard_degree: Annotated[int, Field(ge=-1)] = Field(-1, description="processes that share one copy (FSDP2); -1: the rest")
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = Field(
        "default", description="free gathered weights after the forward; default: in blocks, but not on one process"
    )
    enable_cpu_offload: bool = Field(False, description="keep weights, gradients and optimizer states in host memory")
    tensor_parallel_degree: Degree = Field(1, description="processes that share the heads and hidden units of every layer")
    enable_sequence_parallel: bool = Field(
        True, description="under tensor parallelism, divide the tokens between mixers too: norms, residuals, dropout"
    )
    enable_loss_parallel: bool = Field(
        True, description="under tensor parallelism, divide embedding, head and loss by vocabulary where the degree divides it"
    )
    enable_async_tensor_parallel: bool = Field(False, description="overlap its collectives with products; CUDA and compile only")
    context_parallel_degree: Degree = Field(1, description="processes that share a sequence")
    context_parallel_method: Method = Field(
        "auto", description="how mixers exchange tokens; auto: the first that a mixer declares and that fits"
    )
    context_parallel_load_balance: LoadBalance = Field(
        "auto", description="head_tail: each process has an early and a late part of the sequence; auto: where every mixer can"
    )
    pipeline_parallel_degree: Degree = Field(1, description="must be 1: there is no pipeline parallelism")
    expert_parallel_degree: Degree = Field(1, description="must be 1: there is no expert parallelism")


class ActivationCheckpointConfig(Section, identity=False):
    """[activation_checkpoint]: recompute in the backward rather than keep. No mode changes a gradient."""

    mode: Literal["none", "full", "selective", "memory_budget"] = Field(
        "none",
        description="full: keep each block's input alone; selective: see selective_ac_option; memory_budget: the compiler picks",
    )
    selective_ac_option: Literal["op"] | Annotated[int, Field(ge=1)] = Field(
        "op",
        description="op: keep the results of matrix products, attention and collectives; n: every n-th block as in full",
    )
    memory_budget: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="share of the bytes that mode none keeps; 0: as in full; needs compile.enable"
    )

    @field_validator("selective_ac_option", mode="before")
    @classmethod
    def _number_in_quotes(cls, value: Any) -> Any:
        """TorchTitan writes the number as a string."""
        return int(value) if isinstance(value, str) and value.isdecimal() else value


class CompileConfig(Section, identity=False):
    """[compile]: torch.compile of each block, in training; evaluation and decoding run the same blocks eagerly."""

    enable: bool = Field(False, description="compile each block whole (fullgraph), for rows of one shape that may hold several documents")
    backend: Literal["inductor", "aot_eager", "eager"] = Field(
        "inductor", description="inductor: generate kernels; aot_eager, eager: trace, then run torch's own kernels, to find faults"
    )


class Float8Config(Section):
    """[quantize.linear.float8]: products of the Linears that components declare, in 8 bits by torchao."""

    enable: bool = Field(False, description="multiply in 8 bits; weights, gradients and optimizer states stay as they are")
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp", "mxfp8"] = Field(
        "tensorwise",
        description="what shares a scale: a tensor, a row, a row (weight gradients in full precision), or a block of 32 (mxfp8)",
    )
    enable_fsdp_float8_all_gather: bool = Field(False, description="gather weights in float8 under FSDP; tensorwise only")
    precompute_float8_dynamic_scale_for_fsdp: bool = Field(
        True, description="with it, find all weights' scales in one reduction after each update rather than one a weight"
    )
    filter_fqns: ListOf[str] = Field((), description="leave out the Linears whose names hold one of these")
    emulate: Literal["auto"] | bool = Field(
        "auto",
        description="round to 8 bits, but multiply in float32; auto: where the hardware has no such products",
        json_schema_extra=FREE,
    )


class QuantizeLinearConfig(Section):
    """[quantize.linear]"""

    float8: Float8Config = Field(default_factory=Float8Config, description="8-bit products")


class QuantizeConfig(Section):
    """[quantize]: products in fewer bits."""

    linear: QuantizeLinearConfig = Field(default_factory=QuantizeLinearConfig, description="those of Linears")


class CommConfig(Section, identity=False):
    """[comm]: collectives."""

    init_timeout_seconds: Annotated[int, Field(gt=0)] = Field(300, description="until the first step is done, seconds")
    train_timeout_seconds: Annotated[int, Field(gt=0)] = Field(100, description="from then on, seconds")
    step_timeout_seconds: Annotated[float, Field(ge=0)] = Field(
        300.0, description="a step that takes longer hangs: all processes leave their stacks in the run's folder and end; 0: no limit"
    )
    step_timeout_factor: Annotated[float, Field(gt=1)] = Field(
        10.0, description="the limit is at least so many times the median of the last 50 steps; of a validation or save likewise"
    )
    validation_timeout_seconds: Annotated[float, Field(ge=0)] = Field(
        1800.0, description="a validation that takes longer hangs, with the same end; 0: no limit"
    )
    save_timeout_seconds: Annotated[float, Field(ge=0)] = Field(
        3600.0, description="a save that holds training up for longer, the wait for the upload before it too, hangs likewise; 0: no limit"
    )
