"""The arguments of the subcommands that take a configuration."""

import argparse
from typing import TypeVar

from titanarch.config.load import Loaded, load_config
from titanarch.config.overrides import parse_command_line
from titanarch.config.section import Section

S = TypeVar("S", bound=Section)

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
