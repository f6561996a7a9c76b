"""``titanarch diff``: where two runs part."""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from titanarch.checkpoint.errors import CheckpointError
from titanarch.cli.arguments import layout_of
from titanarch.cli.replay import LAUNCHER
from titanarch.config.errors import ConfigError, Problem
from titanarch.parallel.config import CommConfig, ParallelismConfig
from titanarch.train.divergence import Compared, Parting, StepDifference, Tolerance, logged_losses, parting, step_difference
from titanarch.train.guard import BadGradientError
from titanarch.train.processes import device_type, start_processes, stop_processes
from titanarch.train.recording import Recorder, Recording
from titanarch.train.replay import Layout, RecordedLayout, recorded_layout, replay
from titanarch.train.run_config import DType

_EPILOG = """\
processes:
  --parallelism.KEY VALUE   how the models lie on --processes, such as --parallelism.tensor_parallel_degree 2

Each run is replayed on the processes and with the [parallelism] of its last start; with --processes both are on as many. Where the
layouts differ, so do results in their last digits, and unless --tolerance is given what that explains counts as no difference.
"""
MOST_PROCESSES = 8
"""That a machine without GPUs starts, whatever it has."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN", help="the folders of two runs")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="difference that counts as none, as a share of the value (default: 0, or that of rounding where the layouts differ)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of both replays; default: each run's")
    parser.add_argument("--processes", type=int, metavar="P", help="processes of both replays, on this machine; default: each run's own")
    parser.add_argument("--local-batch-size", type=int, metavar="B", help="rows of a forward; default: each run's, or all")
    parser.add_argument("--no-replay", dest="replay", action="store_false", help="compare the logged losses only")
    parser.set_defaults(takes_config=True)
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


class ReplayError(RuntimeError):
    """A replay on several processes failed, and has said why."""


@dataclass(frozen=True)
class _Replays:
    """How the runs are replayed: ``layouts`` by folder; ``dtype`` and ``local_batch_size``: as in ``Layout``."""

    layouts: dict[Path, RecordedLayout]
    dtype: DType | None
    local_batch_size: int | None

    def __call__(self, folder: Path, step: int) -> Recording:
        """Step ``step`` of the run in ``folder``. ReplayError where other processes fail; ConfigError, CheckpointError."""
        n_processes = self.layouts[folder].n_processes
        if n_processes == 1:
            return self._here(folder, step)
        with tempfile.TemporaryDirectory(prefix="titanarch-diff-") as record:
            command = [sys.executable, *LAUNCHER, f"--nproc-per-node={n_processes}", "-m", "titanarch", "replay", str(folder)]
            command += ["--step", str(step), "--record", record, *self._options(folder)]
            if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
                raise ReplayError(f"{folder} could not be replayed on {n_processes} processes; --processes 1 replays both on one")
            return Recording.read(Path(record))

    def _here(self, folder: Path, step: int) -> Recording:
        processes, recorder = start_processes(CommConfig()), Recorder()
        try:
            layout = Layout(self.layouts[folder].parallelism, self.dtype, self.local_batch_size)
            replayed = replay(folder, step, processes, layout=layout, recorder=recorder)
            return Recording.of([recorder.table], replayed.losses)
        finally:
            stop_processes(processes)

    def _options(self, folder: Path) -> list[str]:
        options = ["--dtype", self.dtype] if self.dtype else []
        options += ["--local-batch-size", str(self.local_batch_size)] if self.local_batch_size is not None else []
        table = self.layouts[folder].parallelism.model_dump()
        return [*options, *(f"--parallelism.{key}={json.dumps(value)}" for key, value in table.items())]


def run(args: argparse.Namespace) -> int:
    """0 where the runs agree, 1 where they part."""
    a, b = args.runs
    parallelism = layout_of(args.config_arguments, "diff")
    if args.config_arguments and args.processes is None:
        raise ConfigError(Problem("--parallelism says how models lie on --processes, which is not given"))
    logged = logged_losses(a), logged_losses(b)
    common = logged[0].keys() & logged[1].keys()
    if not common:
        raise ConfigError(Problem(f"{a} and {b} have no step in common in their metrics"))
    recorded = {folder: recorded_layout(folder) for folder in args.runs}
    tolerance = _tolerance(args.tolerance, recorded.values(), None)
    found = parting(*logged, tolerance.loss)
    if found is None:
        print(f"no difference above {tolerance.loss:g} in the losses of {len(common)} steps that both logged, the last {max(common)}")
        return 0
    print(shown_parting(found))
    if args.replay:
        layouts = (
            recorded if args.processes is None else {folder: _given(args.processes, parallelism, recorded[folder]) for folder in recorded}
        )
        _check(layouts)
        logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
        replays = _Replays(layouts, args.dtype, args.local_batch_size)
        try:
            tolerance = _tolerance(args.tolerance, layouts.values(), args.dtype)
            print(shown_step(step_difference((a, b), found, replays, tolerance), [layouts[folder] for folder in (a, b)]))
        except (CheckpointError, BadGradientError, ReplayError) as error:
            print(error, file=sys.stderr)
    return 1


def _given(n_processes: int, parallelism: ParallelismConfig, recorded: RecordedLayout) -> RecordedLayout:
    return RecordedLayout(n_processes, parallelism, recorded.dtype)


def _tolerance(given: float | None, layouts: Iterable[RecordedLayout], dtype: DType | None) -> Tolerance:
    """That of rounding where layouts differ and none is ``given``."""
    if given is not None:
        return Tolerance(given, given)
    a, b = layouts
    if (a.n_processes, a.parallelism) == (b.n_processes, b.parallelism):
        return Tolerance(0.0, 0.0)
    return Tolerance.of_rounding([dtype] if dtype else [a.dtype, b.dtype])


def _check(layouts: dict[Path, RecordedLayout]) -> None:
    """Raise ConfigError where a run had more processes than can be started here."""
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(Problem("diff starts its processes itself; start it without a launcher"))
    most = torch.cuda.device_count() if device_type() == "cuda" else max(MOST_PROCESSES, os.cpu_count() or 1)
    for folder, layout in layouts.items():
        if not 1 <= layout.n_processes <= most:
            message = f"{folder} would be replayed on {layout.n_processes} processes, and this machine starts 1 to {most}"
            raise ConfigError(Problem(f"{message}; --processes says on how many, and --parallelism.KEY VALUE how the model lies on them"))


def shown_parting(found: Parting) -> str:
    before = f"; the last step that agrees is {found.agreed}" if found.agreed else ""
    return f"the logged losses part at step {found.step}: {found.losses[0]:.9g} and {found.losses[1]:.9g}{before}"


def shown_step(found: StepDifference, layouts: list[RecordedLayout]) -> str:
    """What differs in the replayed step, the cause before what follows of it."""
    where = dict.fromkeys(str(layout) for layout in layouts)
    lines = [f"step {found.step}, replayed on {' and on '.join(where)}: the losses are {found.losses[0]:.9g} and {found.losses[1]:.9g}"]
    lines.append("the rows differ" if found.rows_differ else "the rows are the same")
    lines += _shown("parameters before the step", "", found.parameters)
    lines += _shown("modules' outputs", "", found.modules)
    lines += _shown("gradients of modules' outputs", ", in backward order,", found.gradients)
    lines += _shown("parameters' gradients", "", found.parameter_gradients)
    return "\n".join(lines)


def _shown(what: str, order: str, found: Compared) -> list[str]:
    lines = [f"no difference in {found.n} {what}"]
    if found.differences:
        first = found.differences[0]
        which = f"the first{order} is {first.name}, by {first.share:.3g} of its largest value"
        lines = [f"{len(found.differences)} of {found.n} {what} differ; {which}"]
    if found.n_left_out:
        lines.append(f"{found.n_left_out} more are other parts on other processes, and were not compared")
    return lines
