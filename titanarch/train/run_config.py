"""The root schema: everything that one TOML file says of a run, on one screen."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

import titanarch.models.components  # noqa: F401 (registers what [model] can name)
from titanarch.checkpoint.config import CheckpointConfig
from titanarch.config.section import FREE, ListOf, Section
from titanarch.contract.model import MODELS, ModelConfig
from titanarch.data.config import DataConfig
from titanarch.data.phased_windows import problems
from titanarch.data.phases import Phase, Phases
from titanarch.evaluate.config import EvaluationConfig, ValidationConfig
from titanarch.parallel.config import ActivationCheckpointConfig, CommConfig, CompileConfig, ParallelismConfig, QuantizeConfig
from titanarch.train.guard import BadGradientsConfig
from titanarch.train.metrics.config import MetricsConfig
from titanarch.train.optimizers import OPTIMIZERS, OptimizerConfig
from titanarch.train.profiling import ProfilingConfig
from titanarch.train.reproducibility import DebugConfig
from titanarch.train.schedules import SCHEDULES, SchedulerConfig

PositiveInt = Annotated[int, Field(gt=0)]
DType = Literal["float32", "bfloat16", "float16"]


class JobConfig(Section, identity=False):
    """[job]: the run's folder and name."""

    dump_folder: str = Field(description="folder of the run; the same command with the same folder resumes it", min_length=1)
    description: str = Field("", description="what the run is for, in a sentence")

    @model_validator(mode="after")
    def _is_a_folder(self) -> "JobConfig":
        if "://" in self.dump_folder:
            reason = "a run is locked and appended to, so its folder is of this machine or of a file system that it mounts"
            raise ValueError(f"dump_folder: {reason}; give such a folder, and put checkpoints on the URL with checkpoint.folder")
        return self


class PhaseConfig(Section):
    """[[training.phases]]: what a run does before the steps that [training] itself describes."""

    steps: PositiveInt = Field(description="optimizer steps of the phase")
    seq_len: PositiveInt = Field(description="tokens of a row, a divisor of training.seq_len")
    global_batch_size: PositiveInt = Field(description="rows of an optimizer step, over all processes")
    local_batch_size: PositiveInt | None = Field(
        None,
        description="rows of a forward on one process; unset: training.local_batch_size, or all of its rows where that is unset too",
        json_schema_extra=FREE,
    )


class TrainingConfig(Section):
    """[training]: how much is trained, in what batches and precision. Exactly one of steps, tokens, minutes is given."""

    seq_len: PositiveInt = Field(description="tokens of a row")
    global_batch_size: PositiveInt = Field(description="rows of an optimizer step, over all processes")
    phases: ListOf[PhaseConfig] = Field(
        (), description="earlier phases of the run, of shorter rows or other batches; the section's own sizes follow them"
    )
    local_batch_size: PositiveInt | Literal["auto"] | None = Field(
        None,
        description="rows of a forward on one process; unset: all of its rows at once; auto: as many as are predicted to fit",
        json_schema_extra=FREE,
    )
    steps: PositiveInt | None = Field(None, description="budget, optimizer steps")
    tokens: PositiveInt | None = Field(None, description="budget, tokens")
    minutes: Annotated[float, Field(gt=0)] | None = Field(None, description="budget, minutes of training")
    max_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="gradients are clipped to this global 2-norm; inf: never")
    mixed_precision_param: DType | Literal["auto"] = Field(
        "auto", description="dtype of compute; auto: bfloat16 on a GPU or CPU that multiplies matrices in it, else float32"
    )
    mixed_precision_reduce: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype in which gradients are summed over processes"
    )
    z_loss_weight: Annotated[float, Field(ge=0)] = Field(0.0, description="factor of the squared log-partition in the loss; 1e-4 is common")
    gc_freq: PositiveInt = Field(50, description="steps between garbage collections, on all processes at once", json_schema_extra=FREE)

    @model_validator(mode="after")
    def _one_budget(self) -> "TrainingConfig":
        given = [name for name in ("steps", "tokens", "minutes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, tokens and minutes; given: {', '.join(given) or 'none'}")
        return self

    @model_validator(mode="after")
    def _phases_fit(self) -> "TrainingConfig":
        if self.phases and self.local_batch_size == "auto":
            raise ValueError("local_batch_size: auto finds a size for one length; give a number, and one to each of the phases")
        for number, problem in problems(self.run_phases(1)):
            raise ValueError(f"phases.{number}: {problem}" if number < len(self.phases) else f"seq_len: {problem}")
        return self

    def run_phases(self, data_parallel: int) -> Phases:
        """The phases of the run on ``data_parallel`` ranks, the section's own the last; ``auto`` counts as the fewest rows."""
        own = self.local_batch_size

        def phase(of: "PhaseConfig | TrainingConfig", local: int | None, n_steps: int | None) -> Phase:
            return Phase(of.seq_len, of.global_batch_size, local or max(of.global_batch_size // data_parallel, 1), n_steps)

        given = 1 if own == "auto" else own
        earlier = [phase(each, each.local_batch_size or given, each.steps) for each in self.phases]
        return Phases.of([*earlier, phase(self, given, None)])


class ExperimentalConfig(Section, identity=False):
    """[experimental]"""

    custom_import: str | ListOf[str] = Field((), description="modules imported before anything is read, to register components")


class RunConfig(Section):
    """One run. What is declared free may change when it is resumed; all else makes it another run."""

    job: JobConfig = Field(description="the run's folder and name")
    model: Annotated[ModelConfig, MODELS] = Field(description="the architecture")
    data: DataConfig = Field(default_factory=DataConfig, description="what is read, and how")
    training: TrainingConfig = Field(description="how much is trained, in what batches and precision")
    optimizer: Annotated[OptimizerConfig, OPTIMIZERS] = Field(description="the optimizer")
    lr_scheduler: Annotated[SchedulerConfig, SCHEDULES] = Field(
        default_factory=lambda: SCHEDULES.resolve("constant"), description="what the learning rate is multiplied by"
    )
    bad_gradients: BadGradientsConfig = Field(
        default_factory=BadGradientsConfig, description="steps whose gradient is not finite, or far larger than usual"
    )
    parallelism: ParallelismConfig = Field(default_factory=ParallelismConfig, description="how processes share the work")
    activation_checkpoint: ActivationCheckpointConfig = Field(default_factory=ActivationCheckpointConfig, description="recompute or keep")
    compile: CompileConfig = Field(default_factory=CompileConfig, description="torch.compile")
    quantize: QuantizeConfig = Field(default_factory=QuantizeConfig, description="products in fewer bits")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="when the state is saved and loaded")
    metrics: MetricsConfig = Field(default_factory=MetricsConfig, description="what is logged, how often and where")
    profiling: ProfilingConfig = Field(default_factory=ProfilingConfig, description="traces and memory snapshots")
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="losses inside the loop")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="at the end, and by `titanarch eval`")
    comm: CommConfig = Field(default_factory=CommConfig, description="collectives")
    debug: DebugConfig = Field(default_factory=DebugConfig, description="seed and determinism")
    experimental: ExperimentalConfig = Field(default_factory=ExperimentalConfig, description="custom components")
