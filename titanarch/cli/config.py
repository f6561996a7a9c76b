"""``titanarch config``: show, check and document configurations."""

import argparse
import json
import os
from typing import Any

from titanarch.cli.arguments import add_config_arguments, load_from_arguments
from titanarch.config.dump import dump_toml, to_table
from titanarch.config.errors import ConfigError
from titanarch.config.identity import identity_hash
from titanarch.config.keys import KeyPath, join_key
from titanarch.config.load import Loaded
from titanarch.config.reference import reference_page
from titanarch.config.schema import json_schema
from titanarch.config.tree import Node
from titanarch.train.check import check_run
from titanarch.train.processes import device_type
from titanarch.train.run_config import RunConfig


def configure(parser: argparse.ArgumentParser) -> None:
    """Add ``show``, ``check``, ``schema`` and ``docs``."""
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    show = actions.add_parser("show", help="print the resolved configuration as TOML", allow_abbrev=False)
    show.add_argument("--origins", action="store_true", help="write behind each value where it comes from")
    add_config_arguments(show)
    check = actions.add_parser("check", help="say whether a configuration can run here; exit with 2 if not", allow_abbrev=False)
    add_config_arguments(check)
    check.description = "WORLD_SIZE in the environment is the number of processes to check for (default: 1)."
    schema = actions.add_parser("schema", help="print the JSON schema of a TOML file, for editors", allow_abbrev=False)
    schema.add_argument("--whole", action="store_true", help="of a file that extends no other, so that required keys must be there")
    actions.add_parser("docs", help="print the page of all keys as Markdown", allow_abbrev=False)


def run(args: argparse.Namespace) -> int:
    """Print what was asked for on stdout. ConfigError where the configuration is wrong."""
    if args.action == "schema":
        print(json.dumps(json_schema(RunConfig, whole=args.whole), indent=2, allow_nan=False))
    elif args.action == "docs":
        print(reference_page(RunConfig), end="")
    else:
        loaded = load_from_arguments(args, RunConfig)
        if args.action == "show":
            notes = _origins(loaded) if args.origins else None
            print(dump_toml(loaded.config, notes=notes), end="")
        else:
            print(f"configuration is valid: {loaded.path}, {_check(loaded)} (identity {identity_hash(loaded.config)[:12]})")
    return 0


def _check(loaded: Loaded[RunConfig]) -> str:
    """Refuse what cannot run on the processes to come; say how many they are, and on what."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE={text}: the number of processes to check for is wanted, from 1")
    world_size, kind = int(text), device_type()
    try:
        check_run(loaded.config, world_size=world_size, device_type=kind)
    except ConfigError as error:
        raise loaded.located(error) from error
    return f"{world_size} process{'es' if world_size > 1 else ''} on {kind}"


def _origins(loaded: Loaded[RunConfig]) -> dict[str, str]:
    """For every key that is not a table, where its value was written."""
    notes: dict[str, str] = {}
    _note(to_table(loaded.config), (), loaded.tree, notes)
    return notes


def _note(table: dict[str, Any], path: KeyPath, tree: Node, notes: dict[str, str]) -> None:
    for key, value in table.items():
        inside = (*path, key)
        if isinstance(value, dict):
            _note(value, inside, tree, notes)
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                _note(item, (*inside, index), tree, notes)
        else:
            node, depth = tree.find(inside)
            # the bare name of a component stands one level above its kind
            written = depth == len(inside) or (depth == len(path) and node.value == value)
            file, line = node.origin
            notes[join_key(inside)] = "default" if not written else file if line is None else f"{file}:{line}"
