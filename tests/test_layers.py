"""The house rules that can be read from the source: who imports whom, where imports stand, how long things are."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "titanarch"

ORDER = (
    ("config",),
    ("ops",),
    ("contract",),
    ("models", "parallel", "data"),
    ("checkpoint",),
    ("evaluate",),
    ("train",),
    ("plan",),
    ("studies",),
    ("testing",),
    ("cli",),
)
LEVEL = {folder: level for level, folders in enumerate(ORDER) for folder in folders}

MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 80

DEFERRED = {
    "causal_conv1d": "needs a CUDA build",
    "datasets": "an extra, and slow",
    "fla": "needs a GPU",
    "mamba_ssm": "needs a CUDA build",
    "matplotlib": "slow, and only a drawn plot needs it",
    "pyarrow": "slow, and only parquet needs it",
    "scipy": "an extra",
    "sentencepiece": "only runs with such a tokenizer need it",
    "tensorboard": "slow, and only one sink needs it",
    "tiktoken": "an extra",
    "tokenizers": "only runs with such a tokenizer need it",
    "torch._inductor": "slow, and only asynchronous tensor parallelism changes its settings",
    "torch.distributed._symmetric_memory": "needs GPUs that reach each other's memory",
    "torch.utils.tensorboard": "slow, and only one sink needs it",
    "torchao": "takes seconds to import, and only float8 needs it",
    "transformers": "an extra, and slow",
    "triton": "only where there is a GPU",
    "wandb": "an extra",
    "zstandard": "only .zst files need it",
}
"""What may be imported inside a function, and why."""

TORCH_FREE = {"config"}
"""Folders that must not import torch: a wrong configuration is told without it."""

REGISTRATIONS = ("register",)
"""How the name of a function starts that may be called when a module is imported."""


@dataclass(frozen=True)
class Import:
    """One imported module: ``titanarch.config.errors``; ``inside`` a function or not."""

    module: str
    line: int
    inside: bool


def module_of(path: Path) -> tuple[str, ...]:
    """``titanarch/config/errors.py`` as ("titanarch", "config", "errors"); a package is the name of its folder."""
    parts = path.with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def walk(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, and whether it stands in a function."""
    for child in ast.iter_child_nodes(node):
        yield child, inside
        yield from walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def imports_of(tree: ast.Module, path: Path) -> Iterator[Import]:
    """What a file imports, relative names made absolute, ``import_module`` of a literal name too."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
    for node, inside in walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, inside)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from titanarch import data` names a folder; elsewhere the name may be a module or not, and does no harm.
                yield Import(f"{module}.{alias.name}", node.lineno, inside)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and name.value.startswith("titanarch."):
                yield Import(name.value, node.lineno, inside=False)


def is_or_is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer_breaches(tree: ast.Module, path: Path) -> Iterator[str]:
    """Imports that go against ORDER. ``path`` is relative to the repository."""
    parts = module_of(path)
    folder = parts[1] if len(parts) > 1 else None
    if folder is not None and folder not in LEVEL and folder != "__main__":
        yield f"{path}: no layer is called {folder}; tests/test_layers.py lists them"
        return
    for found in imports_of(tree, path):
        where = f"{path}:{found.line}"
        if folder in TORCH_FREE and is_or_is_in(found.module, "torch"):
            yield f"{where}: {folder} does without torch"
        target = found.module.split(".")
        if target[0] != "titanarch" or len(target) < 2 or target[1] not in LEVEL:
            continue
        if folder is None:
            yield f"{where}: the package's own __init__ imports no layer"
        elif folder != "__main__" and target[1] != folder and LEVEL[target[1]] >= LEVEL[folder]:
            yield f"{where}: {folder} must not import {target[1]}"


def deferred_breaches(tree: ast.Module, path: Path) -> Iterator[str]:
    """Imports inside a function that are not in DEFERRED."""
    for found in imports_of(tree, path):
        if found.inside and not any(is_or_is_in(found.module, package) for package in DEFERRED):
            yield f"{path}:{found.line}: import of {found.module} inside a function; DEFERRED in tests/test_layers.py lists what may be"


def import_work(tree: ast.Module, path: Path) -> Iterator[str]:
    """Calls that run when the module is imported and whose result is dropped: they are there for what they do."""
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            names = ast.unparse(node.value.func).replace("(", ".").split(".")
            if not any(name.startswith(REGISTRATIONS) for name in names):
                yield f"{path}:{node.lineno}: importing the module calls {ast.unparse(node.value.func)}"
        elif isinstance(node, ast.For | ast.While | ast.With):
            yield f"{path}:{node.lineno}: importing the module runs a {type(node).__name__.lower()} block"


def bare_excepts(tree: ast.Module, path: Path) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{path}:{node.lineno}: bare except"


def too_long(tree: ast.Module, path: Path, lines: int) -> Iterator[str]:
    if lines > MOST_LINES_OF_A_FILE:
        yield f"{path}: {lines} lines; at most {MOST_LINES_OF_A_FILE}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MOST_LINES_OF_A_FUNCTION:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines; at most {MOST_LINES_OF_A_FUNCTION}"


def breaches(source: str, path: Path) -> list[str]:
    """All breaches of all rules in one file."""
    tree = ast.parse(source)
    return [
        *layer_breaches(tree, path),
        *deferred_breaches(tree, path),
        *import_work(tree, path),
        *bare_excepts(tree, path),
        *too_long(tree, path, source.count("\n")),
    ]


def test_the_package_keeps_the_rules() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10, "the package was not found"
    found = [breach for file in files for breach in breaches(file.read_text("utf-8"), file.relative_to(REPOSITORY))]
    assert not found, "\n".join(found)


def test_every_folder_of_the_package_is_a_layer() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(LEVEL)


WRONG = {
    "a later layer": ("titanarch/config/a.py", "from titanarch.train.loop import run\n", "config must not import train"),
    "a sibling": ("titanarch/models/a.py", "import titanarch.parallel.mesh\n", "models must not import parallel"),
    "a sibling, the other way": ("titanarch/parallel/a.py", "from titanarch import models\n", "parallel must not import models"),
    "a relative name": ("titanarch/data/sources/a.py", "from ...models import decoder\n", "data must not import models"),
    "a relative name in a package": ("titanarch/data/__init__.py", "from ..parallel import mesh\n", "data must not import parallel"),
    "for types only": (
        "titanarch/ops/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from titanarch.contract.mixer import Mixer\n",
        "a.py:3: ops must not import contract",
    ),
    "by its name": (
        "titanarch/ops/a.py",
        "import importlib\nx = importlib.import_module('titanarch.cli.main')\n",
        "ops must not import cli",
    ),
    "torch in config": ("titanarch/config/a.py", "from torch import nn\n", "config does without torch"),
    "no layer": ("titanarch/helpers/a.py", "", "no layer is called helpers"),
    "the root": ("titanarch/__init__.py", "from titanarch.train import loop\n", "imports no layer"),
    "inside a function": ("titanarch/cli/a.py", "def f():\n    import json\n", "a.py:2: import of json inside a function"),
    "inside a method": (
        "titanarch/cli/a.py",
        "class A:\n    def f(self):\n        from titanarch.ops import x\n",
        "import of titanarch.ops.x inside",
    ),
    "a name that only starts alike": ("titanarch/cli/a.py", "def f():\n    import tritonic\n", "import of tritonic inside a function"),
    "work": ("titanarch/cli/a.py", "import torch\ntorch.set_num_threads(1)\n", "calls torch.set_num_threads"),
    "a loop": ("titanarch/cli/a.py", "for i in range(3):\n    pass\n", "runs a for block"),
    "bare except": ("titanarch/cli/a.py", "try:\n    x = 1\nexcept:\n    pass\n", "a.py:3: bare except"),
    "a long file": ("titanarch/cli/a.py", "x = 1\n" * 401, "401 lines; at most 400"),
    "a long function": ("titanarch/cli/a.py", "def f():\n" + "    x = 1\n" * 80, "f has 81 lines; at most 80"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_breach_is_found(case: str) -> None:
    path, source, message = WRONG[case]
    found = breaches(source, Path(path))
    assert len(found) == 1
    assert message in found[0]


RIGHT = {
    "an earlier layer": ("titanarch/train/a.py", "from titanarch.models.decoder import Decoder\nfrom titanarch.config import errors\n"),
    "its own folder": ("titanarch/data/a.py", "from titanarch.data import rows\nfrom .rows import Row\n"),
    "the way in": ("titanarch/__main__.py", "from titanarch.cli.main import main\nif __name__ == '__main__':\n    main()\n"),
    "a slow package": (
        "titanarch/data/a.py",
        "def f():\n    import pyarrow.parquet\n    from torch.utils.tensorboard import SummaryWriter\n",
    ),
    "a registration": ("titanarch/ops/a.py", "import torch\nop.register_fake(f)\nREGISTRY.register('x')(A)\n"),
    "a long enough function": ("titanarch/cli/a.py", "def f():\n" + "    x = 1\n" * 79),
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_right_passes(case: str) -> None:
    path, source = RIGHT[case]
    assert breaches(source, Path(path)) == []
