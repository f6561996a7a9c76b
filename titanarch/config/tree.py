"""A configuration as a tree that remembers where each value was written."""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from titanarch.config.errors import ConfigError, Problem
from titanarch.config.keys import KeyPath
from titanarch.config.positions import key_lines

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Origin(NamedTuple):
    """Where a value was written: a file, or ``command line``, and the line from 1 where there is one."""

    file: str
    line: int | None


@dataclass(frozen=True)
class Node:
    """A TOML value and its origin. ``value`` is a dict of Nodes, a list of Nodes or a plain scalar."""

    value: Any
    origin: Origin

    def plain(self) -> Any:
        """The value without origins."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def find(self, path: KeyPath) -> tuple["Node", int]:
        """The deepest node on the way to ``path`` that was written, and how many parts of the path lead to it.

        Index 0 of what is no array is that value itself: a single item may stand for an array of one.
        """
        node = self
        for depth, part in enumerate(path):
            if part == 0 and not isinstance(node.value, list):
                continue
            inside = dict(enumerate(node.value)) if isinstance(node.value, list) else node.value
            if not isinstance(inside, dict) or part not in inside:
                return node, depth
            node = inside[part]
        return node, len(path)


def grow(value: Any, origin_of: Callable[[KeyPath], Origin], path: KeyPath = ()) -> Node:
    """A plain TOML value as a tree; ``origin_of`` a path tells where its value was written."""
    if isinstance(value, Mapping):
        value = {key: grow(item, origin_of, (*path, key)) for key, item in value.items()}
    elif isinstance(value, list):
        value = [grow(item, origin_of, (*path, index)) for index, item in enumerate(value)]
    return Node(value, origin_of(path))


def read_tree(path: Path) -> Node:
    """The tree of a TOML file. ConfigError where it cannot be read or is not TOML."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(Problem(f"cannot read the configuration: {error.strerror}", file=path)) from error
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(Problem("not UTF-8 text, which TOML demands; save the file as UTF-8", file=path, line=line)) from error
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_problem(str(error), text, path)) from error
    lines = key_lines(text)
    return grow(table, lambda key: Origin(str(path), lines[key] if key else None))


def _syntax_problem(message: str, text: str, path: Path) -> Problem:
    where = re.search(r" \(at line (\d+), column (\d+)\)$", message)
    if where is None:
        return Problem(f"not valid TOML: {message}", file=path, line=text.count("\n") + 1)
    reason = f"{message[: where.start()]}, at column {where.group(2)}"
    return Problem(f"not valid TOML: {reason}", file=path, line=int(where.group(1)))
