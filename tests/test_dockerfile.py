"""The Dockerfile, read as text: what each target copies, installs, runs as and starts. tests/test_repository.py reads it too."""

import fnmatch
import json
import re
from pathlib import Path

import pytest

from tests.test_repository import docker_stages

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = docker_stages((REPOSITORY / "Dockerfile").read_text("utf-8"))
NEEDED = (  # by the installation and the entry point
    *("run_train.sh", "scripts/environment.sh", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"),
    *("titanarch/__init__.py", "titanarch/data/corpus", "train_configs/debug.toml"),
)
TARGETS = pytest.mark.parametrize("target", ["cpu", "cuda", "rocm"])


def ignored(path: str) -> bool:
    """Whether a path, or a folder that it lies in, is kept from the image."""
    patterns = [line.removeprefix("**/").rstrip("/") for line in (REPOSITORY / ".dockerignore").read_text("utf-8").split()]
    parents = [path, *(str(parent) for parent in Path(path).parents)]
    return any(fnmatch.fnmatch(each, pattern) or fnmatch.fnmatch(Path(each).name, pattern) for each in parents for pattern in patterns)


@TARGETS
def test_what_is_copied_exists(target: str) -> None:
    copies = [arguments.split() for name, arguments in STAGES[target] if name == "COPY"]
    assert copies
    for arguments in copies:
        flags = [argument for argument in arguments if argument.startswith("--")]
        assert flags == ["--chown=titanarch:titanarch"]
        for source in arguments[len(flags) : -1]:
            assert (REPOSITORY / source).exists(), source
    assert [path for path in NEEDED if not (REPOSITORY / path).exists() or ignored(path)] == []


@TARGETS
def test_the_last_user_is_not_root(target: str) -> None:
    """And has a number, by which Kubernetes knows that it is not; nothing is installed as root after it."""
    users = [arguments for name, arguments in STAGES[target] if name == "USER"]
    assert users == ["titanarch"]
    made = " ".join(arguments for name, arguments in STAGES[target] if name == "RUN")
    assert re.search(r"useradd --create-home --uid 10001 titanarch\b", made)


@TARGETS
def test_the_entry_point_is_the_launcher(target: str) -> None:
    last_name, last_arguments = STAGES[target][-1]
    assert last_name == "ENTRYPOINT"
    assert json.loads(last_arguments) == ["/opt/titanarch/run_train.sh"]
    assert dict(STAGES[target])["ENV"].startswith("TITANARCH_PYTHON="), "so that a start installs nothing"


@TARGETS
def test_versions_are_those_of_the_constraints(target: str) -> None:
    """cpu and cuda by the launcher's own installation; rocm with all of them but the base image's torch."""
    runs = " ".join(arguments for name, arguments in STAGES[target] if name == "RUN")
    if target == "rocm":
        assert "grep -v '^torch==' constraints.txt > /tmp/constraints.txt" in runs
        assert re.search(r"pip install .*--constraint /tmp/constraints\.txt .*--editable \.", runs)
        assert "assert torch.version.hip" in runs
    else:
        assert "source scripts/environment.sh && choose_python run" in runs
        assert '--constraint "$REPOSITORY/constraints.txt"' in (REPOSITORY / "scripts/environment.sh").read_text("utf-8")
    assert ["ARG", "TORCH_INDEX_URL"] in [list(each) for each in STAGES[target]] or target == "rocm"


@TARGETS
def test_a_failing_command_fails_the_build(target: str) -> None:
    """The shell of every RUN stops at the first failure, also inside a pipe."""
    names = [name for name, _ in STAGES[target]]
    assert json.loads(dict(STAGES[target])["SHELL"]) == ["/bin/bash", "-euo", "pipefail", "-c"]
    assert names.index("SHELL") < names.index("RUN")


@TARGETS
def test_packages_of_the_system_leave_no_lists(target: str) -> None:
    installs = [arguments for name, arguments in STAGES[target] if name == "RUN" and "apt-get install" in arguments]
    assert all("--no-install-recommends" in each and each.endswith("rm -rf /var/lib/apt/lists/*") for each in installs)
    assert bool(installs) is (target != "rocm")
