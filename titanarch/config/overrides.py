"""The command line of a run: ``--config FILE`` and overrides such as ``--training.steps 100``."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from titanarch.config.errors import ConfigError, Problem
from titanarch.config.keys import parse_key
from titanarch.config.tree import Node, Origin, grow

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COMMAND_LINE = "command line"
"""What stands for the file's name in the origin of an override."""

FILE_OPTIONS = ("config", "job.config_file")
"""The options that name the configuration file; the second is for those at home in TorchTitan."""


def parse_command_line(argv: Sequence[str]) -> tuple[Path, list[str]]:
    """The configuration file, and the overrides for ``load_config``, each as one ``--key=value`` or ``--key``.

    ConfigError where no file is named, more than one is, or an argument is no option.
    """
    files: list[str] = []
    overrides: list[str] = []
    problems: list[Problem] = []
    for option, value, problem in _options(argv):
        if problem is not None:
            problems.append(problem)
        elif option not in FILE_OPTIONS:
            overrides.append(f"--{option}" if value is None else f"--{option}={value}")
        elif value:
            files.append(value)
        else:
            problems.append(Problem(f"--{option} needs a file, as in --{option} train_configs/debug.toml", file=COMMAND_LINE))
    if len(set(files)) > 1:
        names = ", ".join(dict.fromkeys(files))
        problems.append(Problem(f"one configuration file at a time, got {names}; to combine files use 'extends'", file=COMMAND_LINE))
    if not files and not problems:
        problems.append(Problem("no configuration file; give one, as in --config train_configs/debug.toml", file=COMMAND_LINE))
    if problems:
        raise ConfigError(*problems)
    return Path(files[0]), overrides


def override_trees(overrides: Sequence[str]) -> list[Node]:
    """Each override as a tree of its own, in order. ConfigError names every argument that is no override."""
    trees: list[Node] = []
    problems: list[Problem] = []
    for option, value, problem in _options(overrides):
        if problem is None:
            path, end = _parse_option(option)
            if end == len(option):
                trees.append(_tree(path, True if value is None else parse_value(value)))
                continue
            problem = Problem(f"'--{option}' is no key; write --section.key value", file=COMMAND_LINE)
        problems.append(problem)
    if problems:
        raise ConfigError(*problems)
    return trees


def parse_value(text: str) -> Any:
    """A TOML value; the text itself where it is none."""
    try:
        table = tomllib.loads(f"value = {text}")
        items = tomllib.loads(f"value = [{text}]")["value"]
    except tomllib.TOMLDecodeError:
        return text
    # "1 # 2" and "1,2" must not lose what follows the first value
    return table["value"] if len(table) == 1 and len(items) == 1 else text


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str | None, Problem | None]]:
    """Name and value of each option; a value of None where the next argument is an option, or there is none."""
    position = 0
    while position < len(arguments):
        option, equals, value = arguments[position].partition("=")
        position += 1
        if not option.startswith("--") or len(option) == 2:
            given = arguments[position - 1]
            yield "", None, Problem(f"'{given}' belongs to no option; write --section.key value", file=COMMAND_LINE)
        elif equals:
            yield option[2:], value, None
        elif position < len(arguments) and not arguments[position].startswith("--"):
            yield option[2:], arguments[position], None
            position += 1
        else:
            yield option[2:], None, None


def _parse_option(option: str) -> tuple[tuple[str, ...], int]:
    try:
        return parse_key(option)
    except ValueError:
        return (), -1


def _tree(path: tuple[str, ...], value: Any) -> Node:
    for name in reversed(path):
        value = {name: value}
    return grow(value, lambda key: Origin(COMMAND_LINE, None))
