"""The ``titanarch`` command. A subcommand's module is imported only when it is chosen, so that ``--help`` is fast."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from titanarch import __version__
from titanarch.config.errors import ConfigError


class CommandModule(Protocol):
    """What the module of a subcommand has."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments. See ``cli.arguments`` for a subcommand that takes a configuration."""

    def run(self, args: argparse.Namespace) -> int:
        """Do the work and return the exit status. A ConfigError is printed and exits with 2."""


@dataclass(frozen=True)
class Command:
    module: str
    help: str


COMMANDS = {
    "train": Command("titanarch.cli.train", "run a configuration, on the processes that a launcher started"),
    "config": Command("titanarch.cli.config", "show, check and document configurations"),
    "plan": Command("titanarch.cli.plan", "predict memory, communication and time of a run, on machines that are not here"),
    "coordcheck": Command("titanarch.cli.coordcheck", "train a few steps at several widths, and see whether activations move alike"),
    "data": Command("titanarch.cli.data", "tokenize a source, train a tokenizer, fetch a corpus, look at what a run reads"),
    "checkpoint": Command("titanarch.cli.checkpoint", "list, verify, compare and average checkpoints"),
    "eval": Command("titanarch.cli.eval", "evaluate the model of a run"),
    "replay": Command("titanarch.cli.replay", "make a step of a run again, and show it beside what was logged"),
    "diff": Command("titanarch.cli.diff", "find the first step and module at which two runs part"),
    "check": Command("titanarch.cli.check", "check that a component, the package's or your own, keeps the contract"),
    "components": Command("titanarch.cli.components", "list everything that a model can be made of"),
    "new": Command("titanarch.cli.new", "begin a component of your own, with a configuration and tests"),
}
"""Every subcommand: its module and its line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; ``argv`` is without the program's name. Returns the exit status: 2 for a ConfigError."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and arguments[0].startswith("--local_rank="):  # from deepspeed's launcher, which sets LOCAL_RANK to the same
        del arguments[0]
    name = _parser().parse_args(arguments[:1]).command
    module = cast(CommandModule, importlib.import_module(COMMANDS[name].module))
    parser = argparse.ArgumentParser(prog=f"titanarch {name}", description=COMMANDS[name].help, allow_abbrev=False)
    parser.set_defaults(takes_config=False)
    module.configure(parser)
    args, rest = parser.parse_known_args(arguments[1:])
    if rest and not args.takes_config:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.config_arguments = rest
    try:
        return module.run(args)
    except ConfigError as error:
        sys.stdout.flush()
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at exit
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="titanarch", description="Pretrain language models to compare architectures.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"titanarch {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    return parser
