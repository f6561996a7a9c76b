"""The start of a run: processes, folder, seed, trainer."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titanarch.config.dump import dump_toml
from titanarch.config.errors import ConfigError
from titanarch.config.identity import identity_table
from titanarch.config.load import Loaded
from titanarch.train.check import check_run
from titanarch.train.local_batch import MemoryPlanner, with_local_batch
from titanarch.train.memory_report import REPORT_FILE, is_out_of_memory, memory_report
from titanarch.train.metrics.environment import environment_record
from titanarch.train.metrics.files import read_json
from titanarch.train.processes import Processes, start_processes, stop_processes
from titanarch.train.reproducibility import resolve_seed
from titanarch.train.resolve import resolve
from titanarch.train.run_config import RunConfig
from titanarch.train.run_folder import RunFolder
from titanarch.train.trainer import Trainer, run_path

BUDGET_KEYS = ("training.steps", "training.tokens", "training.minutes")


def train(loaded: Loaded[RunConfig], planner: MemoryPlanner | None = None) -> tuple[dict[str, Any], bool]:
    """Run what ``loaded`` says on the processes that the launcher started; the result, and whether this is process 0.

    ``planner``: chooses ``local_batch_size = "auto"``, and says what would fit when memory runs out.

    Raises ConfigError, with files and lines, before anything is written where the configuration cannot run here, and
    OutOfMemory with a report where memory runs out.
    """
    processes = start_processes(loaded.config.comm)
    try:
        try:
            check_run(loaded.config, world_size=processes.world_size, device_type=processes.device.type)
            path = run_path(loaded.config)
            config = resolve(loaded.config, seed=_seed(loaded.config, path, processes), device_type=processes.device.type)
            config, note = with_local_batch(config, processes, planner)
            folder = _open_folder(config, path, processes)
        except ConfigError as error:
            raise loaded.located(error) from error
        try:
            with processes.watch.explained():
                trainer = Trainer(config, processes, folder)
                trainer.notes = (*trainer.notes, note) if note else trainer.notes
                return trainer.run(), processes.is_main
        except ConfigError as error:
            raise loaded.located(error) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise memory_report(error, config, processes, folder=path, planner=planner) from error
        finally:
            folder.close()
    finally:
        stop_processes(processes)


def _seed(config: RunConfig, path: Path, processes: Processes) -> int:
    """The configured seed, that of the run that the folder holds, or a drawn one."""
    configured = config.debug.seed
    identity = RunFolder(path).identity_path
    if configured is None and identity.exists():
        configured = read_json(identity).get("debug.seed")
    return resolve_seed(configured, processes.device)


def _open_folder(config: RunConfig, path: Path, processes: Processes) -> RunFolder:
    """The run's folder, opened by process 0; every process raises where it cannot be."""
    extends = not config.lr_scheduler.depends_on_budget
    folder, failure = RunFolder(path), None
    if processes.is_main:
        try:
            folder = RunFolder.start(
                path,
                identity=identity_table(config),
                config_toml=dump_toml(config),
                environment=environment_record(device=processes.device, n_processes=processes.world_size),
                allowed=BUDGET_KEYS if extends else (),
            )
            (path / REPORT_FILE).unlink(missing_ok=True)
        except ConfigError as error:
            failure = error
    if processes.world_size > 1:
        failed = torch.tensor(float(failure is not None), device=processes.device)
        dist.broadcast(failed, src=0)
        if failed.item() and not processes.is_main:
            raise ConfigError("process 0 could not open the run's folder")
    if failure is not None:
        raise failure
    return folder
