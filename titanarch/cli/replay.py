"""``titanarch replay``: make a step of a run again, and show it beside what was logged."""

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path

from titanarch.checkpoint.errors import CheckpointError
from titanarch.cli.arguments import layout_of
from titanarch.config.errors import ConfigError, Problem
from titanarch.parallel.config import CommConfig
from titanarch.train.guard import BadGradientError
from titanarch.train.processes import start_processes, stop_processes
from titanarch.train.recording import Recorder, write
from titanarch.train.replay import Layout, Replayed, logged_row, replay

_EPILOG = """\
processes:
  --parallelism.KEY VALUE   how the model lies on the processes, such as --parallelism.tensor_parallel_degree 2;
                            unless given, each has rows of its own
"""
LAUNCHER = ("-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-ranks-filter=0")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of the run (its job.dump_folder)")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the step, from 1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of compute; default: the run's")
    parser.add_argument("--processes", type=int, metavar="P", help="processes on this machine; default: those of the launcher, or 1")
    parser.add_argument("--local-batch-size", type=int, metavar="B", help="rows of a forward; default: the run's, or all of a process")
    parser.add_argument("--rolled-back", action="store_true", help="the attempt that the run went back from, of a step that it made again")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write what the step computes to this folder, as diff compares it")
    parser.set_defaults(takes_config=True)
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run(args: argparse.Namespace) -> int:
    layout = Layout(layout_of(args.config_arguments, "replay"), args.dtype, args.local_batch_size)
    if args.processes is not None and "WORLD_SIZE" not in os.environ and args.processes > 1:
        launcher = [sys.executable, *LAUNCHER, f"--nproc-per-node={args.processes}"]
        return subprocess.run([*launcher, "-m", "titanarch", *_own_arguments(args)], check=False).returncode
    processes = start_processes(CommConfig())
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    try:
        if args.processes not in (None, processes.world_size):
            raise ConfigError(Problem(f"--processes {args.processes}, but the launcher started {processes.world_size}; leave it out"))
        recorder = Recorder() if args.record is not None else None
        replayed = replay(args.run, args.step, processes, layout=layout, rolled_back=args.rolled_back, recorder=recorder)
        if recorder is not None:
            write(args.record, processes.rank, recorder, replayed.losses)
        if processes.is_main:
            print(shown(args.run, replayed))
    except (CheckpointError, BadGradientError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        stop_processes(processes)
    return 0


def shown(folder: Path, replayed: Replayed) -> str:
    """The step, a line each for what was logged too, and the norms by layer."""
    found, logged = replayed.inspection, logged_row(folder, replayed.step)
    start = f"the checkpoint of step {replayed.start}" if replayed.start else "the initial weights"
    lines = [f"{folder}, step {replayed.step}, from {start}: rows {replayed.rows.first} to {replayed.rows.last}", ""]
    over = "logged" if logged is None or logged[1] == replayed.step else f"logged, mean of steps {logged[1]} to {replayed.step}"
    lines.append(f"{'':24}{'replayed':>16}  {over}")
    for name, value in (("loss", found.loss), ("grad_norm", found.norm)):
        was = "-" if logged is None or name not in logged[0] else f"{logged[0][name]:.9g}"
        lines.append(f"{name:24}{value:16.9g}  {was}")
    lines += ["", "gradient norms by layer", *(f"{layer:24}{norm:16.9g}" for layer, norm in found.norms.items())]
    if found.forward is not None:
        place = found.forward
        lines.append(f"first output that is not finite: {place.module} (micro-batch {place.micro_batch} of process {place.process})")
    if found.first_backward is not None:
        lines.append(f"first gradient that is not finite, in backward order: {found.first_backward}")
    return "\n".join(lines)


def _own_arguments(args: argparse.Namespace) -> list[str]:
    """The command again, for the processes of a launcher."""
    given = ["replay", str(args.run), "--step", str(args.step)]
    given += ["--dtype", args.dtype] if args.dtype else []
    given += ["--local-batch-size", str(args.local_batch_size)] if args.local_batch_size is not None else []
    given += ["--record", str(args.record)] if args.record is not None else []
    return [*given, *(["--rolled-back"] if args.rolled_back else []), *args.config_arguments]
