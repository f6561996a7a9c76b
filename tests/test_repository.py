"""What the repository as a whole promises: files at the top, no traces of a machine, configurations that load and explain themselves."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import Field

from titanarch.config.errors import ConfigError
from titanarch.config.load import load_config
from titanarch.config.section import Section
from titanarch.train.run_config import RunConfig

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.relative_to(REPOSITORY) for path in (REPOSITORY / "train_configs").rglob("*.toml"))
EXECUTABLE = ("run_train.sh", "scripts/test.sh", ".ci/run")
REQUIRED = (
    *EXECUTABLE,
    "CONTRIBUTING.md",
    "Dockerfile",
    "LICENSE",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "scripts/environment.sh",
)
DATA_FOLDER = Path("titanarch/data/corpus")  # texts and vocabularies: whatever they say is data

MACHINE_PATH = re.compile("(?<![\\w.*])/(" + "|".join(("work", "root", "opt/pypi", "opt/wheels")) + ")\\b(?![-.\\w])/?")
"""An absolute path of somebody's machine; the last part of an address or of a relative path does not count."""


def committed_files() -> list[Path]:
    """The files that are, or would be, committed, relative to the repository."""
    listing = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [Path(name) for name in listing.split("\0") if name and (REPOSITORY / name).is_file()]


@pytest.mark.parametrize("name", REQUIRED)
def test_required_file(name: str) -> None:
    assert (REPOSITORY / name).stat().st_size > 0


@pytest.mark.parametrize("name", EXECUTABLE)
def test_executable(name: str) -> None:
    assert os.access(REPOSITORY / name, os.X_OK)


def machine_paths(text: str) -> list[str]:
    """The lines that hold a path of one machine."""
    return [line.strip() for line in text.splitlines() if MACHINE_PATH.search(line)]


def test_no_paths_of_a_machine() -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("no git repository: the files that count are not known")
    found = []
    for path in committed_files():
        if DATA_FOLDER in path.parents:
            continue
        try:
            text = (REPOSITORY / path).read_text("utf-8")
        except UnicodeDecodeError:  # a picture or other binary file
            continue
        found += [f"{path}: {line}" for line in machine_paths(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", ["work", "root", "opt/wheels"])
def test_a_path_of_a_machine_is_found(folder: str) -> None:
    assert machine_paths(f"fine\n  path = '/{folder}/main/x'  \n") == [f"path = '/{folder}/main/x'"]
    assert machine_paths(f"https://example.org/{folder}/a and a/{folder}/b") == []


def header_of(text: str) -> str:
    """The comment that opens a TOML file, without the signs."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return "\n".join(lines)


def header_problems(text: str, path: Path) -> Iterator[str]:
    """What the opening comment of a configuration does not tell. ``path`` is relative to the repository."""
    header = header_of(text)
    if len(header.split("\n", 1)[0].removeprefix("Purpose:").split()) < 3 or not header.startswith("Purpose: "):
        yield "the first line is no 'Purpose: ...'"
    if not re.search(r"^Hardware: \S", header, re.MULTILINE):
        yield "no line 'Hardware: ...'"
    reference = re.search(r"Expected: as ([\w.-]+\.toml)", header)
    expected = header.partition("Expected")[2].partition("Command:")[0]
    if not (reference and (REPOSITORY / path.parent / reference[1]).is_file()):
        if not re.search(r"\b(time|seconds|minutes|hours|days)\b", expected):
            yield "no expected time"
        if not re.search(r"\bloss\b", expected):
            yield "no expected loss"
    if not re.search(rf"^Command: \S.* {re.escape(path.as_posix())}\b", header, re.MULTILINE):
        yield f"no line 'Command: ...' that runs {path}"


def test_the_shipped_configurations_are_there() -> None:
    assert {Path("train_configs/debug.toml"), Path("train_configs/small_alibi.toml")} <= set(CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_configuration_explains_itself(path: Path) -> None:
    assert list(header_problems((REPOSITORY / path).read_text("utf-8"), path)) == []


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_configuration_loads(path: Path) -> None:
    assert isinstance(load_config(REPOSITORY / path, [], RunConfig).config, RunConfig)


def test_a_wrong_configuration_does_not_load(tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text("[training]\nlearning_rte = 1\n")
    with pytest.raises(ConfigError, match=r"wrong\.toml:2: \[training\] learning_rte"):
        load_config(file, [], RunConfig)


GOOD_HEADER = """# Purpose: a small model with ALiBi, to see that everything works.
# Hardware: 2 cores. Expected: 9 minutes, loss 4.9 nats.
# Command: ./run_train.sh --config train_configs/a.toml
[model]
"""


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("a small model with ALiBi, to see that everything works.", "A test.", "the first line is no 'Purpose: ...'"),
        ("# Purpose", "\n# Purpose", "the first line is no 'Purpose: ...'"),
        ("Hardware:", "On", "no line 'Hardware: ...'"),
        ("9 minutes", "", "no expected time"),
        ("loss", "", "no expected loss"),
        ("9 minutes, loss 4.9 nats.", "as missing.toml", "no expected loss"),
        ("a.toml", "b.toml", "no line 'Command: ...' that runs train_configs/a.toml"),
    ],
)
def test_a_poor_header_is_found(old: str, new: str, problem: str) -> None:
    path = Path("train_configs/a.toml")
    assert list(header_problems(GOOD_HEADER, path)) == []
    assert problem in header_problems(GOOD_HEADER.replace(old, new), path)
    assert list(header_problems(GOOD_HEADER.replace("9 minutes, loss 4.9 nats.", "as debug.toml"), path)) == []


def sections() -> set[type[Section]]:
    """Every schema of the package that is known once the root schema is imported."""
    found: set[type[Section]] = set()
    pending = [Section]
    while pending:
        for schema in pending.pop().__subclasses__():
            if schema not in found and schema.__module__.startswith("titanarch."):
                found.add(schema)
                pending.append(schema)
    return found


def undescribed(schema: type[Section]) -> list[str]:
    """The fields without a description of one line."""
    return [
        f"{schema.__module__}.{schema.__qualname__}.{name}: {field.description!r}"
        for name, field in schema.model_fields.items()
        if not field.description or "\n" in field.description.strip()
    ]


def test_every_field_is_described() -> None:
    schemas = sections()
    assert RunConfig in schemas
    assert [field for schema in sorted(schemas, key=lambda each: each.__qualname__) for field in undescribed(schema)] == []


def test_an_undescribed_field_is_found() -> None:
    class Poor(Section):
        steps: int
        lines: int = Field(1, description="two\nlines")
        tokens: int = Field(1, description="tokens of a row")

    assert [each.split(".")[-1] for each in undescribed(Poor)] == ["steps: None", "lines: 'two\\nlines'"]


DOCKERFILE = REPOSITORY / "Dockerfile"


def docker_stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """The instructions (name, arguments) of each named stage, continued lines joined, comments left out."""
    stages: dict[str, list[tuple[str, str]]] = {"": []}
    stage = stages[""]
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n\s*", "", lines).splitlines():
        if not line.strip():
            continue
        name, arguments = line.split(None, 1)
        if name == "FROM":
            base, _, stage_name = arguments.partition(" AS ")
            stage = stages.setdefault(stage_name, [])
            arguments = base
        stage.append((name, arguments))
    return stages


@pytest.mark.parametrize("target", ["cpu", "cuda", "rocm"])
def test_docker_target(target: str) -> None:
    """A base that BASE replaces, the launcher as a user other than root, an environment that the launcher will use."""
    stages = docker_stages(DOCKERFILE.read_text("utf-8"))
    assert stages[""] == [("ARG", "BASE")]
    stage = stages[target]
    last = dict(stage)
    assert re.fullmatch(r"\$\{BASE:-[\w./-]+:[\w.-]+\}", last["FROM"])
    assert last["USER"] == "titanarch"
    assert any(
        name == "RUN" and "useradd" in arguments and arguments.split("useradd")[1].split()[3] == "titanarch" for name, arguments in stage
    )
    assert stage.index(("USER", "titanarch")) < stage.index(("ENTRYPOINT", '["/opt/titanarch/run_train.sh"]'))
    assert last["WORKDIR"] == "/opt/titanarch"
    assert last["ENV"].startswith("TITANARCH_PYTHON=")
    assert any(name == "COPY" and arguments.endswith(". .") for name, arguments in stage)


def test_docker_ignores_what_is_local() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text("utf-8").split()
    assert {".git", ".venv", "outputs"} <= set(ignored)


def test_constraints_pin_every_direct_dependency() -> None:
    """Exact versions for what is installed by default and by the extras of the tests."""
    lines = (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {match[1] for line in lines if (match := re.match(r"([a-z0-9-]+)==[\w.]+(; .*)?$", line))}
    assert len(pinned) == sum(not line.startswith("#") for line in lines)
    project = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    lists = re.findall(r"^(?:dependencies|reference|dev|study) = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)
    assert len(lists) == 4
    names = {re.match(r"[\w-]+", requirement)[0] for each in lists for requirement in re.findall(r'"([^"]+)"', each)}  # type: ignore[index]
    assert names - pinned == set()
    assert "torch==2.13.0" in lines
