"""``titanarch plan``: what a configuration would need on machines that are not here."""

import argparse
import logging

from titanarch.cli.arguments import add_config_arguments, load_from_arguments
from titanarch.config.errors import ConfigError
from titanarch.plan.devices import DEVICES, device_named
from titanarch.plan.plan import make_plan
from titanarch.plan.report import plan_text
from titanarch.plan.suggest import suggest, suggestions_text
from titanarch.train.run_config import RunConfig


def configure(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.usage = f"{parser.prog} --config FILE --world-size N [--device NAME] [--suggest] [--section.key VALUE ...]"
    parser.add_argument("--world-size", type=_positive, required=True, metavar="N", help="number of processes to plan for")
    parser.add_argument("--device", default="h200", metavar="NAME", help=f"what each process has: {', '.join(DEVICES)} (default: h200)")
    parser.add_argument("--suggest", action="store_true", help="rank layouts that fit by their predicted step time")


def run(args: argparse.Namespace) -> int:
    """Print the plan on stdout. ConfigError with every conflict where the run would be refused."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    device = device_named(args.device)
    loaded = load_from_arguments(args, RunConfig)
    try:
        if args.suggest:
            found = suggest(loaded.config, world_size=args.world_size, device=device)
            print(suggestions_text(found, world_size=args.world_size, device=args.device), end="")
        else:
            plan = make_plan(loaded.config, world_size=args.world_size, device=device)
            print(plan_text(plan, name=str(loaded.path), device=args.device), end="")
    except ConfigError as error:
        raise loaded.located(error) from error
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of processes, which count from 1")
    return int(text)
