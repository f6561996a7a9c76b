"""``titanarch coordcheck``: do activations move as much at every width?"""

import argparse
import logging
import sys

from titanarch.cli.arguments import add_config_arguments, load_from_arguments
from titanarch.config.errors import ConfigError, Problem
from titanarch.train.coordinate_check import Moved, coordinate_check
from titanarch.train.processes import start_processes, stop_processes
from titanarch.train.reproducibility import resolve_seed
from titanarch.train.resolve import resolve
from titanarch.train.run_config import RunConfig


def configure(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.usage = f"{parser.prog} --config FILE --widths N N ... [--steps N] [--tolerance X] [--section.key VALUE ...]"
    parser.add_argument("--widths", type=int, nargs="+", required=True, metavar="N", help="values of model.d_model, at least two")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="optimizer steps at the full learning rate (default: 4)")
    parser.add_argument(
        "--tolerance", type=float, default=0.3, metavar="X", help="largest exponent of the width that counts as none (default: 0.3)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 where something moves the more the wider the model is."""
    if len(set(args.widths)) < 2 or min(args.widths) < 1 or args.steps < 1:
        raise ConfigError(Problem("coordcheck compares at least two widths over at least one step, such as --widths 64 128 256"))
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    loaded = load_from_arguments(args, RunConfig)
    processes = start_processes(loaded.config.comm)
    try:
        if processes.world_size > 1:
            raise ConfigError(Problem("coordcheck runs on one process; start it without a launcher"))
        seed = resolve_seed(loaded.config.debug.seed, processes.device)
        config = resolve(loaded.config, seed=seed, device_type=processes.device.type)
        moved = coordinate_check(config, processes, widths=args.widths, steps=args.steps)
    except ConfigError as error:
        raise loaded.located(error) from error
    finally:
        stop_processes(processes)
    print(table(moved, steps=args.steps, parametrization=config.optimizer.parametrization))
    growing = [name for name in moved.by_name if moved.exponent(name) > args.tolerance]
    if growing:
        print(f"{len(growing)} of {len(moved.by_name)} move the more the wider the model is, {growing[-1]} among them")
        return 1
    print(f"nothing moves the more the wider the model is (no exponent above {args.tolerance:g})")
    return 0


def table(moved: Moved, *, steps: int, parametrization: str) -> str:
    """A line for each activation: how far it moved at each width, and the exponent."""
    size = max(map(len, moved.by_name))
    heading = f"{f'moved in {steps} steps, {parametrization}':{size}}" + "".join(f"{width:>11}" for width in moved.widths) + "   exponent"
    lines = [
        f"{name:{size}}" + "".join(f"{value:11.3e}" for value in values) + f"{moved.exponent(name):11.2f}"
        for name, values in moved.by_name.items()
    ]
    return "\n".join([heading, *lines])
