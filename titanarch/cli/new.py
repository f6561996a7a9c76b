"""``titanarch new``: a component that works, with a configuration that trains it and tests that it passes, to be changed."""

import argparse
import importlib.util
import keyword
import re
import sys
from importlib import resources
from pathlib import Path
from shlex import quote
from typing import Any

import titanarch.models.components  # noqa: F401 (registers all)
from titanarch.config.errors import ConfigError
from titanarch.config.registry import Registry
from titanarch.contract.channel import CHANNELS
from titanarch.contract.mixer import MIXERS

SKELETONS = "titanarch.testing.skeletons"
"""The package with what is written, as modules that are read and not imported."""

_EXAMPLE = {"mixer": "moving_average", "channel": "squared_relu"}

_MODEL = {
    "mixer": '# two blocks of it, then one of attention; the pattern repeats over the depth\nlayers = ["{name}", "{name}", "attention"]',
    "channel": 'channel = "{name}"',
}

_TOML = """\
# Purpose: the small decoder (6 layers, 384 wide) with {name}, on the corpus that comes with titanarch.
# Hardware: 2 CPU cores, or one GPU. Expected time and loss: not measured.
# Command: PYTHONPATH={folder} python -m titanarch train --config {toml}

[job]
dump_folder = "outputs/{name}"

[experimental]
custom_import = "{name}"        # imported before anything is read, and so registered

[model]
name = "decoder"
flavor = "small"
{model}

[model.position]
relative = "alibi"

[training]
seq_len = 128
global_batch_size = 32        # 4,096 tokens a step
steps = 150

[optimizer]
name = "AdamW"
lr = 2e-3
weight_decay = 0.1

[lr_scheduler]
kind = "cosine"
warmup_steps = 20
min_lr_factor = 0.1

[checkpoint]
interval = 50

[validation]
interval = 50
rows = 128

[evaluation]
lengths = [128, 512, 2048]
max_tokens = 16384

[debug]
seed = 42
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the slot, the name and the folder."""
    parser.add_argument("slot", choices=tuple(_EXAMPLE), help="what to begin")
    parser.add_argument("name", help="its name: of the Python file, and in a TOML; lower-case letters, digits and _")
    parser.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="where to write (default: here); made where missing")


def run(args: argparse.Namespace) -> int:
    """Write NAME.py, NAME.toml and test_NAME.py, and say what to run. ConfigError where the name is no good, or a file is there."""
    folder: Path = args.folder
    check_name(args.slot, args.name)
    files = {folder / name: text for name, text in written(args.slot, args.name, folder).items()}
    there = [str(path) for path in files if path.exists()]
    if there:
        raise ConfigError(f"{there[0]} exists, and nothing is overwritten; choose another name or folder, or remove it")
    if args.name in sys.stdlib_module_names or importlib.util.find_spec(args.name) is not None:
        raise ConfigError(
            f"'{args.name}' is a Python module already, which {args.name}.py would hide; choose another, such as my_{args.name}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    on_path = f"PYTHONPATH={quote(str(folder))}"
    print(f"wrote {', '.join(map(str, files))}. They work as they are:\n")
    print(f"{on_path} titanarch check {args.slot} {args.name} --import {args.name} --processes 2")
    print(f"{on_path} python -m pytest {quote(str(folder / f'test_{args.name}.py'))}")
    print(f"{on_path} titanarch train --config {quote(str(folder / f'{args.name}.toml'))}")
    return 0


def check_name(slot: str, name: str) -> None:
    """A ConfigError where ``name`` can be no module, or is taken."""
    registry: Registry[Any] = MIXERS if slot == "mixer" else CHANNELS
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(f"'{name}' cannot be the name of a {slot}; use lower-case letters, digits and _, such as my_{slot}")
    if name in registry:
        raise ConfigError(f"a {registry.slot} '{name}' comes with titanarch; choose another name, such as my_{name}")
    example = _EXAMPLE[slot]
    if name == example:
        return
    words = set(re.findall(r"\w+", _skeleton(f"{example}.py") + _skeleton(f"test_{example}.py")))
    for class_name in (_class_name(name), f"{_class_name(name)}Config"):
        if class_name in words or keyword.iskeyword(class_name):
            raise ConfigError(f"'{name}' would have a class {class_name}, a name that the file has for something else; try my_{name}")


def written(slot: str, name: str, folder: Path) -> dict[str, str]:
    """The three files by name: the example of the slot, renamed."""
    example = _EXAMPLE[slot]
    toml = quote(f"{folder}/{name}.toml")
    return {
        f"{name}.py": _renamed(f"{example}.py", example, name),
        f"{name}.toml": _TOML.format(name=name, folder=quote(str(folder)), toml=toml, model=_MODEL[slot].format(name=name)),
        f"test_{name}.py": _renamed(f"test_{example}.py", example, name),
    }


def _renamed(file: str, example: str, name: str) -> str:
    """The text of ``file`` in one pass, since ``name`` may have ``example`` in it."""
    names = {f"{SKELETONS}.{example}": name, example: name, _class_name(example): _class_name(name)}
    return re.sub("|".join(map(re.escape, names)), lambda found: names[found[0]], _skeleton(file))


def _skeleton(file: str) -> str:
    return resources.files(SKELETONS).joinpath(file).read_text("utf-8")


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))
