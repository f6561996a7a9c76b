"""From TOML files and the command line to one validated configuration."""

import importlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from titanarch.config.errors import ConfigError, Problem
from titanarch.config.explain import describe, explain
from titanarch.config.keys import split_key
from titanarch.config.merge import merge
from titanarch.config.overrides import COMMAND_LINE, override_trees
from titanarch.config.section import Section
from titanarch.config.tree import Node, Origin, grow, read_tree

S = TypeVar("S", bound=Section)

CUSTOM_IMPORT = "experimental.custom_import"
"""The key that names modules to import before validation, so that they can register components."""


@dataclass(frozen=True)
class Loaded(Generic[S]):
    """A configuration and where it came from.

    ``config``: validated. ``table``: what the files and the command line said, merged, without defaults.
    """

    path: Path
    config: S
    table: dict[str, Any]
    tree: Node = field(repr=False)

    def origin(self, key: str) -> Origin:
        """File and line of a key such as ``training.steps``; of the table around it where the key has its default.

        The line is None on the command line, and for a table that no file has.
        """
        return self.tree.find(split_key(key))[0].origin

    def problem(self, key: str, message: str) -> Problem:
        """Something wrong with a key, with the place where it was written."""
        return _located(Problem(message, key=key), self.tree)

    def located(self, error: ConfigError) -> ConfigError:
        """The same error, with the file and line of every key that has none yet."""
        return ConfigError(*(_located(problem, self.tree) for problem in error.problems))


def load_config(path: str | Path, overrides: Sequence[str], schema: type[S]) -> Loaded[S]:
    """Read a file and those it extends, lay the overrides over them, import custom modules, and validate.

    ``overrides``: ``--section.key value``, ``--section.key=value``, or ``--section.key`` alone for true.
    ConfigError holds every problem of every file at once.
    """
    path = Path(path)
    reader = _Reader()
    layers = reader.read(path, ())
    try:
        layers += override_trees(overrides)
    except ConfigError as error:
        reader.problems += error.problems
    if reader.problems:
        raise ConfigError(*reader.problems)
    import_problems = _import_custom(layers)
    merged = reduce(lambda base, over: merge(base, over, (schema,)), layers)
    tree = replace(merged, origin=Origin(str(path), None))
    table = tree.plain()
    problems: list[Problem] = []
    try:
        config = schema.model_validate(table)
    except ValidationError as error:
        problems = explain(error, schema, tree, unknown_components=not import_problems)
    except ConfigError as error:  # from a validator
        problems = [_located(problem, tree) for problem in error.problems]
    if import_problems or problems:
        raise ConfigError(*_sorted([*import_problems, *problems], [layer.origin.file for layer in layers]))
    return Loaded(path, config, table, tree)


def load_overrides(overrides: Sequence[str], schema: type[S]) -> S:
    """What the command line alone says of a configuration, without a file; ConfigError as from ``load_config``."""
    nothing = grow({}, lambda _: Origin(COMMAND_LINE, None))
    tree = reduce(lambda base, over: merge(base, over, (schema,)), override_trees(overrides), nothing)
    try:
        return schema.model_validate(tree.plain())
    except ValidationError as error:
        raise ConfigError(*explain(error, schema, tree)) from error


class _Reader:
    """Reads a file after those it extends, and collects what is wrong with any of them."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def read(self, path: Path, below: tuple[Path, ...]) -> list[Node]:
        """The trees of the files that make up ``path``, the most basic first; ``below``: those that extend it."""
        try:
            tree = read_tree(path)
        except ConfigError as error:
            self.problems += error.problems
            return []
        extends = tree.value.pop("extends", None)
        layers: list[Node] = []
        for node in self.bases(extends):
            base = _beside(path, node.value)
            chain = (*below, path)
            if base.resolve() in [each.resolve() for each in chain]:
                self.refuse(node, f"makes a circle: {' -> '.join(map(str, (*chain, base)))}")
            elif not base.is_file():
                self.refuse(node, f"no file {base}; the path counts from the folder of {path.name}")
            else:
                layers += self.read(base, chain)
        return [*layers, tree]

    def bases(self, extends: Node | None) -> list[Node]:
        """The nodes that name the files to extend."""
        if extends is None:
            return []
        nodes = extends.value if isinstance(extends.value, list) else [extends]
        if all(isinstance(node.value, str) for node in nodes):
            return nodes
        self.refuse(extends, f"wants a file or an array of files, got {describe(extends.plain())}")
        return []

    def refuse(self, node: Node, message: str) -> None:
        self.problems.append(Problem(message, key="extends", file=node.origin.file, line=node.origin.line))


def _beside(path: Path, name: str) -> Path:
    """``name`` as seen from the folder of ``path``, without ``..`` where that means the same file."""
    plain = path.parent / name
    tidy = Path(os.path.normpath(plain))
    return tidy if tidy.resolve() == plain.resolve() else plain


def _import_custom(layers: Iterable[Node]) -> list[Problem]:
    """Import the modules of ``experimental.custom_import``, so that their components are known."""
    path = split_key(CUSTOM_IMPORT)
    found = [node for node, depth in (layer.find(path) for layer in layers) if depth == len(path)]
    if not found:
        return []
    nodes = found[-1].value if isinstance(found[-1].value, list) else [found[-1]]
    problems = []
    for node in nodes:
        message = _import(node.value) if isinstance(node.value, str) else None  # the schema refuses other types
        if message is not None:
            problems.append(Problem(message, key=CUSTOM_IMPORT, file=node.origin.file, line=node.origin.line))
    return problems


def _import(module: str) -> str | None:
    """What keeps a module from being imported."""
    if not all(part.isidentifier() for part in module.split(".")):
        return f"'{module}' is no module; write it as in an import, such as 'my_package.mixers'"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"cannot import '{module}': {error}; install it, or put its folder on PYTHONPATH"
    return None


def _located(problem: Problem, tree: Node) -> Problem:
    if not problem.key or problem.file is not None:
        return problem
    try:
        origin = tree.find(split_key(problem.key))[0].origin
    except ValueError:  # the key of something else than the configuration
        return problem
    return replace(problem, file=origin.file, line=origin.line)


def _sorted(problems: Iterable[Problem], files: list[str]) -> list[Problem]:
    """By file in the order of reading, then by line."""

    def place(problem: Problem) -> tuple[int, int]:
        file = str(problem.file)
        return files.index(file) if file in files else len(files), problem.line or 0

    return sorted(dict.fromkeys(problems), key=place)
