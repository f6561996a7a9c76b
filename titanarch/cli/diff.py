"""``titanarch diff``: where two runs part."""

import argparse
import logging
import sys
from pathlib import Path

from titanarch.checkpoint.errors import CheckpointError
from titanarch.config.errors import ConfigError, Problem
from titanarch.parallel.config import CommConfig
from titanarch.train.divergence import Parting, StepDifference, logged_losses, parting, step_difference
from titanarch.train.guard import BadGradientError
from titanarch.train.processes import start_processes, stop_processes
from titanarch.train.replay import Layout


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN", help="the folders of two runs")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, metavar="X", help="difference that counts as none, as a share of the value (default: 0)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of both replays; default: each run's")
    parser.add_argument("--local-batch-size", type=int, metavar="B", help="rows of a forward; default: each run's, or all")
    parser.add_argument("--no-replay", dest="replay", action="store_false", help="compare the logged losses only")


def run(args: argparse.Namespace) -> int:
    """0 where the runs agree, 1 where they part."""
    a, b = args.runs
    logged = logged_losses(a), logged_losses(b)
    common = logged[0].keys() & logged[1].keys()
    if not common:
        raise ConfigError(Problem(f"{a} and {b} have no step in common in their metrics"))
    found = parting(*logged, args.tolerance)
    if found is None:
        print(f"no difference above {args.tolerance:g} in the losses of {len(common)} steps that both logged, the last {max(common)}")
        return 0
    print(shown_parting(found))
    if args.replay:
        logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
        processes = start_processes(CommConfig())
        try:
            if processes.world_size > 1:
                raise ConfigError(Problem("diff runs on one process; start it without a launcher"))
            layout = Layout(dtype=args.dtype, local_batch_size=args.local_batch_size)
            print(shown_step(step_difference((a, b), found, processes, layout=layout, tolerance=args.tolerance)))
        except (CheckpointError, BadGradientError) as error:
            print(error, file=sys.stderr)
        finally:
            stop_processes(processes)
    return 1


def shown_parting(found: Parting) -> str:
    before = f"; the last step that agrees is {found.agreed}" if found.agreed else ""
    return f"the logged losses part at step {found.step}: {found.losses[0]:.9g} and {found.losses[1]:.9g}{before}"


def shown_step(found: StepDifference) -> str:
    """What differs in the replayed step, the cause before what follows of it."""
    lines = [f"step {found.step}, replayed: the losses are {found.losses[0]:.9g} and {found.losses[1]:.9g}"]
    lines.append("the rows differ" if found.rows_differ else "the rows are the same")
    parts = (("parameters before the step", found.parameters, found.n_parameters), ("modules' outputs", found.modules, found.n_modules))
    for what, differences, n in parts:
        if differences:
            first = differences[0]
            lines.append(f"{len(differences)} of {n} {what} differ; the first is {first.name}, by {first.share:.3g} of its largest value")
        else:
            lines.append(f"no difference in {n} {what}")
    return "\n".join(lines)
