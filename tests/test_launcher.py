"""run_train.sh and the environment it makes, first with recorded calls of python and pip, then with real processes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.distributed import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHER_FILES = ("run_train.sh", "scripts/environment.sh", "scripts/test.sh", "pyproject.toml", "constraints.txt")
LAUNCHER_VARIABLES = (
    *("NGPU", "NNODES", "NODE_RANK", "RDZV_ENDPOINT", "LOG_RANK", "TORCH_INDEX_URL", "PYTHON", "PYTHONPATH", "TITANARCH_PYTHON"),
    *("VIRTUAL_ENV", "OMP_NUM_THREADS", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "LOCAL_ADDR", "MAX_RESTARTS"),
)

RECORDER = f"""#!/usr/bin/env bash
# A python that writes down what it is asked to run. What it is only asked, the real one answers.
case "$*" in
"-m venv "*)
  mkdir -p "$3/bin"
  cp "$0" "$3/bin/python"
  echo "venv" >>"$RECORD" ;;
"-m pip --version") ;;
"-m pip "*)
  echo "${{*:3}}" >>"$RECORD"
  sleep "${{PIP_SECONDS:-0}}"
  exit "${{PIP_STATUS:-0}}" ;;
"-m titanarch config check "*)
  echo "WORLD_SIZE=${{WORLD_SIZE:-}} ${{*:2}}" >>"$RECORD"
  echo "the check speaks"
  exit "${{CHECK_STATUS:-0}}" ;;
"-m "*)
  echo "RANK=${{RANK:-}} OMP_NUM_THREADS=${{OMP_NUM_THREADS:-}} ${{*:2}}" >>"$RECORD"
  exit "${{TRAIN_STATUS:-0}}" ;;
*) exec "{sys.executable}" "$@" ;;
esac
"""

OLD_PYTHON = """#!/usr/bin/env bash
case "$*" in *print*) echo 3.8.18 ;; *) exit 1 ;; esac
"""

INSTALL = "--disable-pip-version-check --no-input install --no-compile --constraint {root}/constraints.txt"


def script(path: Path, text: str) -> Path:
    """Write an executable file."""
    path.write_text(text)
    path.chmod(0o755)
    return path


@dataclass
class Clone:
    """A copy of the launcher's files in a folder of its own, and a python that records."""

    root: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def record(self) -> Path:
        return self.root / "record"

    def environment(self, **variables: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        fixed = {"CUDA_VISIBLE_DEVICES": "", "RECORD": str(self.record)}
        return inherited | fixed | self.variables | variables

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.root / "run_train.sh"), *arguments],
            env=self.environment(**variables),
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that a test can kill all of it
        )

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **variables)
        out, err = process.communicate(timeout=400)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self) -> list[str]:
        """What was recorded since the last look."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        self.record.unlink(missing_ok=True)
        return lines

    def stamps(self) -> set[str]:
        return {path.name for path in (self.root / ".venv").glob("titanarch-*.stamp*")}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clone:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the launcher keeps its logs
    root = tmp_path / "a clone"  # with a space, as in many a home folder
    for name in LAUNCHER_FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    return Clone(root, {"PYTHON": str(script(tmp_path / "recorder", RECORDER))})


TRAIN = "RANK= OMP_NUM_THREADS= titanarch train --config a.toml"


def test_the_environment_is_made_once(clone: Clone) -> None:
    install = INSTALL.format(root=clone.root)
    assert clone.run("--config", "a.toml").returncode == 0
    assert clone.calls() == ["venv", f"{install} --editable .", TRAIN]
    assert clone.run("--config", "a.toml", "--training.steps", "3").returncode == 0
    assert clone.calls() == [f"{TRAIN} --training.steps 3"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_into_the_same_environment(clone: Clone, name: str) -> None:
    clone.run("--config", "a.toml")
    clone.calls()
    with (clone.root / name).open("a") as file:
        file.write("# changed\n")
    assert clone.run("--config", "a.toml").returncode == 0
    assert clone.calls() == [f"{INSTALL.format(root=clone.root)} --editable .", TRAIN]


def test_a_moved_clone_is_installed_again(clone: Clone) -> None:
    clone.run("--config", "a.toml")
    moved = Clone(clone.root.rename(clone.root.with_name("elsewhere")), clone.variables)
    moved.calls()
    assert moved.run("--config", "a.toml").returncode == 0
    assert moved.calls()[0].endswith("--editable .")


def test_a_failed_installation_leaves_no_stamp(clone: Clone) -> None:
    result = clone.run("--config", "a.toml", PIP_STATUS="1")
    assert result.returncode == 1
    assert "pip could not install" in result.stderr
    assert clone.stamps() == set()
    assert not any("titanarch train" in call for call in clone.calls())
    assert clone.run("--config", "a.toml").returncode == 0
    assert clone.calls() == [f"{INSTALL.format(root=clone.root)} --editable .", TRAIN]


def test_a_killed_installation_leaves_no_stamp(clone: Clone) -> None:
    clone.run("--config", "a.toml")
    with (clone.root / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    clone.calls()
    process = clone.start("--config", "a.toml", PIP_SECONDS="60")
    deadline = time.monotonic() + 30
    while not (clone.record.exists() and clone.record.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(clone.calls()) == 1
    assert clone.stamps() == set()
    assert clone.run("--config", "a.toml").returncode == 0
    assert clone.calls()[-1] == TRAIN


def test_two_launches_install_once(clone: Clone) -> None:
    launches = [clone.start("--config", "a.toml", PIP_SECONDS="1") for _ in range(2)]
    errors = [launch.communicate(timeout=200)[1] for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0]
    assert sum("waiting for it" in error for error in errors) == 1
    calls = clone.calls()
    assert len(calls) == 4
    assert sum("--editable" in call for call in calls) == 1
    assert calls[2:] == [TRAIN, TRAIN]


def test_torch_comes_from_the_wanted_index(clone: Clone) -> None:
    install = INSTALL.format(root=clone.root)
    clone.run("--config", "a.toml")
    clone.calls()
    clone.run("--config", "a.toml", TORCH_INDEX_URL="file:///cpu")
    assert clone.calls() == [
        f"{install} --force-reinstall --no-deps --index-url file:///cpu torch",
        f"{install} --extra-index-url file:///cpu --editable .",
        TRAIN,
    ]
    clone.run("--config", "a.toml", TORCH_INDEX_URL="file:///cpu")
    clone.run("--config", "a.toml")
    assert clone.calls() == [TRAIN, TRAIN]
    with (clone.root / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    clone.run("--config", "a.toml")  # an update keeps to the build that was chosen
    assert clone.calls()[:2] == [
        f"{install} --no-deps --index-url file:///cpu torch",
        f"{install} --extra-index-url file:///cpu --editable .",
    ]


def test_the_tests_share_the_environment(clone: Clone) -> None:
    command = ["bash", str(clone.root / "scripts/test.sh"), "tests/data", "-k", "rows"]
    result = subprocess.run(command, env=clone.environment(TRAIN_STATUS="5"), capture_output=True, text=True)
    assert result.returncode == 5
    assert clone.calls() == [
        "venv",
        f"{INSTALL.format(root=clone.root)} --editable .[dev,reference]",
        "RANK= OMP_NUM_THREADS= pytest tests/data -k rows",
    ]
    clone.run("--config", "a.toml")
    assert clone.calls() == [TRAIN]
    result = subprocess.run(command[:2], env=clone.environment(), capture_output=True, text=True)
    assert [call.split()[2] for call in clone.calls()] == ["ruff", "ruff", "mypy", "pytest"]


def test_an_old_python_is_refused(clone: Clone) -> None:
    old = script(clone.root / "python3.8", OLD_PYTHON)
    result = clone.run("--config", "a.toml", PYTHON=str(old))
    assert result.returncode == 1
    assert f"'{old}' is Python 3.8.18; titanarch needs 3.10 or newer: set PYTHON" in result.stderr


def test_a_missing_python_is_told(clone: Clone) -> None:
    result = clone.run("--config", "a.toml", PYTHON="no-such-python")
    assert result.returncode == 1
    assert "no 'no-such-python' found; install Python 3.10 or newer, or set PYTHON" in result.stderr


def test_an_active_environment_that_lacks_titanarch_is_not_used(clone: Clone, tmp_path: Path) -> None:
    other = tmp_path / "other"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(other)], check=True)
    result = clone.run("--config", "a.toml", VIRTUAL_ENV=str(other))
    assert result.returncode == 0
    assert f"the active environment {other} lacks this copy of titanarch" in result.stderr
    assert clone.calls()[0] == "venv"
    result = clone.run("--config", "a.toml", TITANARCH_PYTHON=str(other / "bin/python"))
    assert result.returncode == 1
    assert "lacks this copy of titanarch" in result.stderr
    assert clone.calls() == []


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "TITANARCH_PYTHON"])
def test_a_fitting_environment_is_used(clone: Clone, tmp_path: Path, variable: str) -> None:
    """It fits if it finds torch and this copy of titanarch, not another one."""
    (tmp_path / "active/bin").mkdir(parents=True)
    python = shutil.copy(tmp_path / "recorder", tmp_path / "active/bin/python")
    value = str(python) if variable == "TITANARCH_PYTHON" else str(tmp_path / "active")
    for name in ("titanarch", "torch"):
        (clone.root / name).mkdir()
        (clone.root / name / "__init__.py").touch()
    result = clone.run("--config", "a.toml", **{variable: value, "PYTHONPATH": str(clone.root)})
    assert result.returncode == 0, result.stderr
    assert clone.calls() == [TRAIN]
    assert not (clone.root / ".venv").exists()
    copy = shutil.copytree(clone.root, tmp_path / "copy")
    result = clone.run("--config", "a.toml", **{variable: value, "PYTHONPATH": str(copy)})
    assert "lacks this copy of titanarch" in result.stderr


def test_several_processes_are_checked_then_launched(clone: Clone) -> None:
    result = clone.run("--config", "a.toml", "--training.steps=3", NGPU="2", LOG_RANK="0,1", RANK="7", WORLD_SIZE="8")
    assert result.returncode == 0
    assert result.stdout == ""  # results only
    cores = len(os.sched_getaffinity(0))
    check, launch = clone.calls()[2:]
    assert check == "WORLD_SIZE=2 titanarch config check --config a.toml --training.steps=3"
    logs = result.stderr.rsplit(" is kept in ", 1)[1].strip()
    assert launch == (
        f"RANK= OMP_NUM_THREADS={max(1, cores // 2)} titanarch.train.torchrun --nnodes=1 --nproc-per-node=2 --max-restarts=0 "
        "--rdzv-backend=c10d --rdzv-endpoint=localhost:0 --tee 3 --local-ranks-filter=0,1 "
        f"--log-dir={logs} -m titanarch train --config a.toml --training.steps=3"
    )


def test_a_wrong_configuration_is_not_launched(clone: Clone) -> None:
    assert clone.run("--config", "a.toml", NGPU="2", CHECK_STATUS="2").returncode == 2
    assert [call for call in clone.calls() if "titanarch train" in call] == []


def test_one_process_is_in_no_group_of_an_outer_launcher(clone: Clone) -> None:
    result = clone.run("--config", "a.toml", RANK="7", WORLD_SIZE="8", TRAIN_STATUS="9")
    assert result.returncode == 9
    assert clone.calls()[-1] == TRAIN


def test_the_nodes_of_a_run(clone: Clone) -> None:
    """All meet by c10d; node 0 holds the meeting place, and without a number the node that the endpoint names."""
    meeting = "--rdzv-backend=c10d --rdzv-endpoint=first:29500"
    several = {"NNODES": "2", "RDZV_ENDPOINT": "first:29500"}
    clone.run("--config", "a.toml", **several, NODE_RANK="1", OMP_NUM_THREADS="3", MAX_RESTARTS="4")
    clone.run("--config", "a.toml", **several, NODE_RANK="0", LOCAL_ADDR="10.0.0.3")
    clone.run("--config", "a.toml", **several)
    calls = clone.calls()
    assert calls[2].startswith("WORLD_SIZE=2 ")
    launch = (
        f"OMP_NUM_THREADS=3 titanarch.train.torchrun --nnodes=2 --nproc-per-node=1 --max-restarts=4 {meeting} --rdzv-conf=is_host=0 --tee"
    )
    assert launch in calls[3]
    assert f"--max-restarts=0 {meeting} --rdzv-conf=is_host=1 --local-addr=10.0.0.3 --tee" in calls[5]
    assert f"--max-restarts=0 {meeting} --tee" in calls[7]


def test_one_process_that_may_start_again_has_a_launcher(clone: Clone) -> None:
    clone.run("--config", "a.toml", MAX_RESTARTS="1")
    assert "titanarch.train.torchrun --nnodes=1 --nproc-per-node=1 --max-restarts=1 " in clone.calls()[-1]


def test_schedulers_variables_do_not_reach_the_processes(clone: Clone) -> None:
    """The launcher starts processes of its own; what a scheduler said of its task is not theirs."""
    tell = script(clone.root / "python", '#!/usr/bin/env bash\ncase "$*" in "-m titanarch train "*) env >>"$RECORD" ;; esac\n')
    outer = {"RANK": "1", "SLURM_PROCID": "1", "OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1", "PET_NNODES": "2", "SLURM_JOB_ID": "5"}
    assert clone.run("--config", "a.toml", TITANARCH_PYTHON=str(tell), **outer).returncode == 0
    seen = {line.split("=", 1)[0] for line in clone.calls()}
    assert set(outer) & seen == {"SLURM_JOB_ID"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NGPU": "0"}, "NGPU=0: a whole number of at least 1"),
        ({"NGPU": "two"}, "NGPU=two: a whole number"),
        ({"NNODES": "1:2"}, "NNODES=1:2: a whole number"),
        ({"NNODES": "2"}, "NNODES=2 needs RDZV_ENDPOINT"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "first"}, "RDZV_ENDPOINT=first: host:port is needed, as in node0:29400"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1: a whole number of at least 0"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "a:1", "NODE_RANK": "2"}, "NODE_RANK=2: nodes are numbered from 0 to 1"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1, but NNODES=1"),
        ({"LOG_RANK": "all"}, "LOG_RANK=all: numbers of local processes"),
    ],
)
def test_a_wrong_variable_is_refused_first(clone: Clone, variables: dict[str, str], message: str) -> None:
    result = clone.run("--config", "a.toml", **variables)
    assert result.returncode == 2
    assert message in result.stderr
    assert clone.calls() == []


def test_a_configuration_is_required(clone: Clone) -> None:
    result = clone.run("--training.steps", "3")
    assert result.returncode == 2
    assert "no --config FILE given" in result.stderr
    assert clone.run("--job.config_file=a.toml").returncode == 0
    assert clone.run("--help").stdout.startswith("usage: ./run_train.sh --config FILE")


@pytest.mark.parametrize(
    ("tool", "answer", "variables", "processes"),
    [
        ("nvidia-smi", "GPU 0: A\\n  MIG 1g\\nGPU 1: A\\nGPU 2: A\\n", {}, 3),
        ("nvidia-smi", "NVIDIA-SMI has failed\\n", {}, 1),
        ("nvidia-smi", "GPU 0: A\\nGPU 1: A\\nGPU 2: A\\n", {"CUDA_VISIBLE_DEVICES": "0,2"}, 2),
        ("nvidia-smi", "GPU 0: A\\nGPU 1: A\\n", {"CUDA_VISIBLE_DEVICES": ""}, 1),
        ("nvidia-smi", "GPU 0: A\\nGPU 1: A\\n", {"NGPU": "4"}, 4),
        ("nvidia-smi", "GPU 0: A\\nGPU 1: A\\n", {"HIP_VISIBLE_DEVICES": "0,1,2"}, 2),  # which mean nothing to NVIDIA's
        ("rocm-smi", "GPU[0]\\t\\t: ID: 0x74a1\\nGPU[0]\\t\\t: x\\nGPU[1]\\t\\t: ID: 0x74a1\\n", {}, 2),
        ("rocm-smi", "GPU[0]\\t\\t: ID: 0x74a1\\n", {"HIP_VISIBLE_DEVICES": "0,1,2"}, 3),
        ("rocm-smi", "GPU[0]\\t\\t: ID: 0x74a1\\n", {"ROCR_VISIBLE_DEVICES": "4,5"}, 2),
    ],
)
def test_one_process_a_gpu(clone: Clone, tool: str, answer: str, variables: dict[str, str], processes: int) -> None:
    tools = clone.root / "tools"
    tools.mkdir()
    script(tools / tool, f"#!/usr/bin/env bash\nprintf '{answer}'\n")
    environment = clone.environment(PATH=f"{tools}:{os.environ['PATH']}", **variables)
    if "CUDA_VISIBLE_DEVICES" not in variables:
        del environment["CUDA_VISIBLE_DEVICES"]
    subprocess.run(["bash", str(clone.root / "run_train.sh"), "--config", "a.toml"], env=environment, check=True, capture_output=True)
    last = clone.calls()[-1]
    if processes == 1:
        assert last == TRAIN
    else:
        assert f"--nproc-per-node={processes} " in last


FAKE_TITANARCH = """import os, sys
if sys.argv[1] == "train":
    print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], *sys.argv[2:])
    sys.exit(3 if os.environ["RANK"] == os.environ.get("FAILING_RANK") else 0)
"""


@pytest.fixture
def real(clone: Clone) -> Clone:
    """The real python and torchrun, around a package that only tells its rank."""
    (clone.root / "titanarch").mkdir()
    (clone.root / "titanarch/__init__.py").touch()
    (clone.root / "titanarch/__main__.py").write_text(FAKE_TITANARCH)
    for name in ("train/__init__.py", "train/torchrun.py", "train/stopping.py", "train/watch.py"):  # the launcher's own part
        (clone.root / "titanarch" / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / "titanarch" / name, clone.root / "titanarch" / name)
    clone.variables = {"TITANARCH_PYTHON": sys.executable, "PYTHONPATH": str(clone.root), "NGPU": "2"}
    return clone


def test_torchrun_starts_every_process_and_shows_one(real: Clone) -> None:
    result = real.run("--config", "a.toml", "--training.steps", "3", LOG_RANK="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[rank1]:rank 1 of 2 --config a.toml --training.steps 3"]


def test_a_failing_process_fails_the_launch(real: Clone) -> None:
    result = real.run("--config", "a.toml", FAILING_RANK="1")
    assert result.returncode == 1
    assert re.search(r"process 1 of 2 \(pid \d+\) ended with status 3, before its first step was done\n", result.stderr)
    assert "rank 1" not in result.stdout
    logs = Path(result.stderr.split(" is kept in ", 1)[1].split("\n", 1)[0])
    assert [path.read_text() for path in logs.rglob("1/stdout.log")] == ["rank 1 of 2 --config a.toml\n"]


def test_two_nodes_share_the_ranks(real: Clone) -> None:
    endpoint = f"localhost:{free_port()}"
    nodes = [real.start("--config", "a.toml", NNODES="2", NODE_RANK=str(rank), RDZV_ENDPOINT=endpoint) for rank in (1, 0)]
    output = [node.communicate(timeout=400)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert sorted(output) == ["[rank0]:rank 0 of 4 --config a.toml\n", "[rank2]:rank 2 of 4 --config a.toml\n"]


def titanarch(folder: Path, *arguments: str, processes: str) -> subprocess.CompletedProcess[str]:
    """The launcher of this repository, with the interpreter of the tests; torchrun's logs go to ``folder``."""
    variables = {"TITANARCH_PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    return Clone(REPOSITORY, variables).run(*arguments, NGPU=processes)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_wrong_key_ends_before_the_launch(tmp_path: Path, processes: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(
        f'extends = "{REPOSITORY}/train_configs/debug.toml"\n[job]\ndump_folder = "{tmp_path}/run"\n[training]\nlearning_rte = 1\n'
    )
    result = titanarch(tmp_path, "--config", str(file), processes=processes)
    assert result.returncode == 2
    assert f"{file}:5: [training] learning_rte: unknown key" in result.stderr
    assert "shown: local process" not in result.stderr  # what the launcher says before torchrun
    assert not (tmp_path / "run").exists()


def test_a_failing_run_has_a_status(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder of the run should be")
    result = titanarch(tmp_path, "--config", "train_configs/debug.toml", "--job.dump_folder", f"{tmp_path}/run", processes="1")
    assert result.returncode != 0
    assert str(tmp_path / "run") in result.stderr
