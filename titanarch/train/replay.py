"""A step of a run once more, from its nearest earlier checkpoint, on any layout and in any dtype. Nothing is written."""

from dataclasses import dataclass, field
from pathlib import Path

from titanarch.checkpoint.store import load
from titanarch.config.errors import ConfigError, Problem
from titanarch.config.load import load_config
from titanarch.data.batch import Batch
from titanarch.parallel.config import ParallelismConfig
from titanarch.train.bad_reports import StepRows
from titanarch.train.check import check_run
from titanarch.train.inspection import Inspection, inspect
from titanarch.train.metrics.files import read_json
from titanarch.train.metrics.rows import read_rows
from titanarch.train.processes import Processes
from titanarch.train.recording import Recorder, token_places
from titanarch.train.run_config import DType, RunConfig
from titanarch.train.run_folder import RunFolder
from titanarch.train.setup import checkpoint_location
from titanarch.train.trainer import Trainer


@dataclass(frozen=True)
class Layout:
    """How a step is computed again. ``dtype``, ``local_batch_size``: None as the run has it."""

    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    dtype: DType | None = None
    local_batch_size: int | None = None


@dataclass(frozen=True)
class Replayed:
    """Step ``step``, from the checkpoint of ``start`` (0: the initial weights).

    ``losses``: of the steps between, by step, and of this one.
    """

    step: int
    start: int
    rows: StepRows
    losses: dict[int, float]
    inspection: Inspection


def replay(
    folder: Path,
    step: int,
    processes: Processes,
    *,
    layout: Layout | None = None,
    rolled_back: bool = False,
    recorder: Recorder | None = None,
) -> Replayed:
    """Make step number ``step`` of the run in ``folder`` again, but for its update. Collective.

    ``rolled_back``: the attempt that the run went back from, where it has one. ``recorder``: takes what the step computes. Raises
    ConfigError where there is no such run or step, or ``layout`` does not fit.
    """
    if step < 1:
        raise ConfigError(Problem(f"--step {step}: steps are numbered from 1"))
    layout = layout or Layout()
    config = replayed_config(folder, layout)
    check_run(config, world_size=processes.world_size, device_type=processes.device.type)
    location = checkpoint_location(folder, config.checkpoint)
    trainer = Trainer(config, processes, RunFolder(folder))
    try:
        start = _load(trainer, location, step)
        if not rolled_back:
            trainer.data.pass_rows(_first_row_after_roll_back(folder, start, step))
        losses = _steps_before(trainer, step, processes)
        batches = _draw(trainer)
        if recorder is not None:
            _begin(recorder, trainer, batches)
        inspection = inspect(trainer.train_step, batches, trainer.checkpointer.processes, recorder)
        return Replayed(step, start, trainer.recovery.last_rows, {**losses, step: inspection.loss}, inspection)
    finally:
        trainer.loader.close()
        trainer.checkpointer.close()


def _begin(recorder: Recorder, trainer: Trainer, batches: list[Batch]) -> None:
    """Tell ``recorder`` of the step of ``batches``."""
    places = token_places(
        trainer.mesh,
        batches[0].tokens_BT.shape[1],
        head_tail=trainer.division.head_tail,
        sequence_parallel=trainer.config.parallelism.enable_sequence_parallel,
    )
    recorder.begin(trainer.model, trainer.mesh, batches, first_row=trainer.recovery.last_rows.first, places=places)


@dataclass(frozen=True)
class RecordedLayout:
    """The processes of a run's last start, how its model lay on them, and the dtype of its products."""

    n_processes: int
    parallelism: ParallelismConfig
    dtype: DType

    def __str__(self) -> str:
        told = ", ".join(f"{key} {value}" for key, value in self.parallelism.model_dump(exclude_defaults=True).items())
        return f"{self.n_processes} process{'es' if self.n_processes > 1 else ''}{f' ({told})' if told else ''}"


def recorded_layout(folder: Path) -> RecordedLayout:
    """That of the run in ``folder``. ConfigError where there is none."""
    config = _config_of(folder)
    starts = [int(path.stem.removeprefix("start-")) for path in (folder / "configs").glob("start-*.json")]
    started = read_json(folder / "configs" / f"start-{max(starts)}.json") if starts else {"n_processes": 1}
    dtype = config.training.mixed_precision_param
    assert dtype != "auto", "config.toml is resolved"
    return RecordedLayout(int(started["n_processes"]), config.parallelism, dtype)


def _config_of(folder: Path) -> RunConfig:
    if not (folder / "config.toml").is_file():
        raise ConfigError(Problem(f"{folder} holds no config.toml, so it is no run; give the dump_folder of a run"))
    return load_config(folder / "config.toml", (), RunConfig).config


def replayed_config(folder: Path, layout: Layout) -> RunConfig:
    """The run's configuration, with ``layout`` and without what it would write."""
    config = _config_of(folder)
    changed = {"mixed_precision_param": layout.dtype, "local_batch_size": layout.local_batch_size}
    return config.model_copy(
        update={
            "parallelism": layout.parallelism,
            "training": config.training.model_copy(update={key: value for key, value in changed.items() if value is not None}),
            "metrics": config.metrics.model_copy(update={"sinks": ()}),
            "validation": config.validation.model_copy(update={"enable": False}),
        }
    )


def logged_row(folder: Path, step: int) -> tuple[dict[str, float | int], int] | None:
    """The training row of ``step``, and the first of the steps that its means are over; None where it was not logged."""
    path, before = RunFolder(folder).metrics_path, 0
    for row in read_rows(path) if path.is_file() else ():
        if "tokens_per_second" not in row:
            continue
        if row["step"] == step:
            return row, before + 1
        before = int(row["step"])
    return None


def _load(trainer: Trainer, location: str, step: int) -> int:
    """The newest sound checkpoint before ``step``, or what the run began with; its step, 0 for that."""
    processes, verify = trainer.checkpointer.processes, trainer.config.checkpoint.verify
    loaded = load(location, trainer.state(), before=step, how=verify, processes=processes)
    if loaded is None:
        trainer.checkpointer.load_initial(trainer.state())
    start = 0 if loaded is None else loaded.step
    if trainer.config.training.minutes is not None and step > start + 1:
        message = f"the learning rates between step {start}, the last checkpoint before it, and step {step} went by the clock"
        raise ConfigError(Problem(f"{message}: of a run by training.minutes only the step after a checkpoint can be made again"))
    trainer.recovery.good_step = start
    trainer.budget.start(trainer.progress.step, trainer.progress.tokens)
    return start


def _first_row_after_roll_back(folder: Path, start: int, step: int) -> int:
    """Where the run's rows went on after it went back to the checkpoint of ``start`` for the last time; 0 where it did not."""
    path = RunFolder(folder).metrics_path
    rows = [row for row in read_rows(path) if "rolled_back_from" in row and start < row["step"] <= step] if path.is_file() else []
    return int(rows[-1]["skipped_last_row"]) + 1 if rows else 0


def _steps_before(trainer: Trainer, step: int, processes: Processes) -> dict[int, float]:
    """Make the steps up to ``step``; their losses."""
    losses: dict[int, float] = {}
    while trainer.progress.step < step - 1:
        number = trainer.progress.step + 1
        outcome = trainer.train_step(number, _draw(trainer))
        bad = trainer.guard.bad
        if bad is not None and bad.action == "roll_back":
            trainer.recovery.roll_back(trainer.state(), trainer.checkpointer.wait)
            continue
        losses[number] = processes.sum(outcome.loss.clone()).item()
        trainer.advance()
    return losses


def _draw(trainer: Trainer) -> list[Batch]:
    """The rows of the next step. ConfigError, on all processes, where the data do not last for it."""
    trainer.ending.look_ahead()
    if trainer.ending.data_ended:
        raise ConfigError(Problem(f"the run has no step {trainer.progress.step + 1}: {trainer.ending.data_ended}"))
    return trainer.draw(trainer.loader)
