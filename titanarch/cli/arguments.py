"""The arguments of the subcommands that take a configuration."""

import argparse
from typing import TypeVar

from pydantic import Field

from titanarch.config.errors import ConfigError, Problem
from titanarch.config.load import Loaded, load_config, load_overrides
from titanarch.config.overrides import COMMAND_LINE, override_trees, parse_command_line
from titanarch.config.section import Section
from titanarch.parallel.config import ParallelismConfig

S = TypeVar("S", bound=Section)


class Layout(Section):
    """What the command line may say of the configuration of a run that exists; the run has settled the rest."""

    parallelism: ParallelismConfig = Field(default_factory=ParallelismConfig, description="how the model lies on the processes")


_EPILOG = """\
configuration:
  --config FILE             the TOML file of the run; --job.config_file is the same
  --section.key VALUE       lay a value, written as in TOML, over the file's; a text that is no TOML value is a string
  --section.key             the same as --section.key true
"""


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a subcommand take ``--config FILE`` and overrides, which argparse does not know and hands on as they are."""
    parser.set_defaults(takes_config=True)
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = f"{parser.prog} --config FILE [--section.key VALUE ...]"


def load_from_arguments(args: argparse.Namespace, schema: type[S]) -> Loaded[S]:
    """The configuration that the command line names. ConfigError as from ``load_config``."""
    path, overrides = parse_command_line(args.config_arguments)
    return load_config(path, overrides, schema)


def layout_of(arguments: list[str], command: str) -> ParallelismConfig:
    """[parallelism] of the command line; ConfigError where it names another section."""
    others = [key for tree in override_trees(arguments) for key in tree.plain() if key != "parallelism"]
    if others:
        message = f"is no option of {command}, and no key of [parallelism]; the run has settled the rest of its configuration"
        raise ConfigError(*(Problem(f"'--{key}' {message}", file=COMMAND_LINE) for key in others))
    return load_overrides(arguments, Layout).parallelism
