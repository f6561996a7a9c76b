"""Starts real runs in processes of their own, as the launcher does."""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from tests.distributed import CONTEXT, free_port
from titanarch.cli.main import main

ROOT = Path(__file__).parents[2]

SMALL = """
[job]
dump_folder = "{folder}"
[model]
name = "decoder"
n_layers = 2
d_model = 32
n_heads = 2
dropout = 0.1
channel = {{ kind = "mlp", activation = "gelu" }}
mixers = {{ attention = {{ dropout = 0.1 }} }}
position = {{ relative = "linear_cpb", absolute = "learned", start_augmentation = 48 }}
[model.position.absolute]
kind = "learned"
max_length = 64
[data]
limit_documents = 4
cache_dir = "{cache}"
[training]
seq_len = 32
global_batch_size = 8
steps = 20
mixed_precision_param = "float32"
[optimizer]
name = "AdamW"
lr = 1e-3
[lr_scheduler]
kind = "cosine"
warmup_steps = 3
[checkpoint]
interval = 5
[metrics]
log_freq = 1
sinks = ["jsonl"]
[validation]
interval = 10
rows = 8
train_rows = 8
[evaluation]
lengths = [32]
max_tokens = 512
[debug]
seed = 7
"""
SMALL = SMALL.replace('position = {{ relative = "linear_cpb", absolute = "learned", start_augmentation = 48 }}\n', "").replace(
    "[model.position.absolute]", '[model.position]\nrelative = "linear_cpb"\nstart_augmentation = 48\n[model.position.absolute]'
)


def write_config(folder: Path, name: str, cache: Path) -> Path:
    """The small configuration, for a run in ``folder / name``."""
    path = folder / f"{name}.toml"
    path.write_text(SMALL.format(folder=folder / name, cache=cache))
    return path


def arguments_of(config: Path, *overrides: str) -> list[str]:
    """Those that train ``config``."""
    return ["train", "--config", str(config), *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def environments(n_processes: int) -> list[dict[str, str]]:
    """One for each of the processes of a run."""
    shared = environment()
    if n_processes == 1:
        return [shared]
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n_processes)}
    own = {"LOCAL_WORLD_SIZE": str(n_processes)}
    return [shared | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n_processes)]


def train(config: Path, *overrides: str, n_processes: int = 1, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Train to the end; fails with the output where the exit status is another.

    Several processes find each other by what a launcher would tell them; what launchers themselves do, tests/test_launcher.py tries.
    """
    arguments = arguments_of(config, *overrides)
    ends = run_forks([(arguments, variables) for variables in environments(n_processes)])
    found = next((end.returncode for end in ends if end.returncode), 0)
    out, err = "".join(end.stdout for end in ends), "".join(end.stderr for end in ends)
    assert found == status, f"exit status {found}\n{out[-3000:]}\n{err[-6000:]}"
    return subprocess.CompletedProcess(arguments, status, out, err)


def run_forks(lives: Sequence[tuple[Sequence[str], Mapping[str, str]]], *, cwd: Path = ROOT) -> list[subprocess.CompletedProcess[str]]:
    """``python -m titanarch`` at the same time with each of the arguments and environments, in the folder ``cwd``, to the end.

    They are forks of a server that has imported the package, which takes seconds. Fails with their output where one does not end.
    """
    with tempfile.TemporaryDirectory(prefix="output-") as folder:
        outputs = [(Path(folder, f"stdout-{n}"), Path(folder, f"stderr-{n}")) for n in range(len(lives))]
        forks = [start(arguments, variables, output, cwd=cwd) for (arguments, variables), output in zip(lives, outputs, strict=True)]
        deadline = time.monotonic() + 400
        for fork in forks:
            fork.join(max(0.0, deadline - time.monotonic()))
        late = [fork for fork in forks if fork.is_alive()]
        for fork in late:
            fork.kill()
        texts = [[path.read_text() if path.exists() else "" for path in output] for output in outputs]
    assert not late, f"{len(late)} of {len(lives)} processes did not end\n{''.join(err for _, err in texts)[-6000:]}"
    codes = [fork.exitcode if fork.exitcode is not None else -1 for fork in forks]
    return [
        subprocess.CompletedProcess(arguments, code, out, err) for (arguments, _), code, (out, err) in zip(lives, codes, texts, strict=True)
    ]


def start(arguments: Sequence[str], variables: Mapping[str, str], output: tuple[Path, Path], *, cwd: Path = ROOT) -> ForkServerProcess:
    """One that is not waited for; ``output``: the files of its stdout and stderr."""
    fork = CONTEXT.Process(target=_live, args=(list(arguments), dict(variables), output, cwd), daemon=False)
    fork.start()
    return fork


def _live(arguments: list[str], variables: dict[str, str], output: tuple[Path, Path], cwd: Path) -> None:
    gc.freeze()  # what the server has imported is no garbage, and to look through it takes longer than a step
    os.setsid()  # so that it can be killed with all that it started
    for path, number in zip(output, (1, 2), strict=True):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.exit(main(arguments))


def train_and_kill(config: Path, folder: Path, after_step: int, *overrides: str, n_processes: int = 1) -> None:
    """Train, and kill -9 all processes once the row of ``after_step`` is written."""
    nowhere = Path(os.devnull)
    processes = [start(arguments_of(config, *overrides), variables, (nowhere, nowhere)) for variables in environments(n_processes)]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(process.is_alive() for process in processes):
        if any(row["step"] >= after_step for row in rows(folder)):
            break
        time.sleep(0.02)
    for process in processes:
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"


def rows(folder: Path) -> list[dict[str, Any]]:
    """The complete rows of a run's metrics."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step."""
    return {row["step"]: row["loss"] for row in rows(folder) if "loss" in row}
