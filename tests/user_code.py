"""A user's own components in a folder of theirs: run as they run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.train.runs import run_forks

REPOSITORY = Path(__file__).resolve().parents[1]

SHORT = {
    "model.n_layers": 3,
    "data.limit_documents": 2,
    "training.seq_len": 32,
    "training.global_batch_size": 4,
    "training.steps": 3,
    "lr_scheduler.warmup_steps": 1,
    "checkpoint.enable": "false",
    "metrics.log_freq": 1,
    "metrics.sinks": '["jsonl"]',
    "validation.enable": "false",
}


def python(*arguments: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """The interpreter of the tests on this repository, run in ``folder``, which is on PYTHONPATH."""
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)


def titanarch(*arguments: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """The same of ``python -m titanarch``, in a fork that has imported the package and nothing of a user's or a test's."""
    (ran,) = run_forks([(arguments, environment(folder))], cwd=folder)
    return ran


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)]), "OMP_NUM_THREADS": "1"}


def losses_of_three_steps(folder: Path, name: str, **options: str) -> list[float]:
    """Of ``name``.toml in ``folder``; ``options``: more keys, with ``__`` for the dot."""
    own = {"job.dump_folder": f"run_{name}", "data.cache_dir": "cache", **{key.replace("__", "."): value for key, value in options.items()}}
    arguments = [f"--{key}={value}" for key, value in {**SHORT, **own}.items()]
    trained = titanarch("train", "--config", f"{name}.toml", *arguments, folder=folder)
    assert trained.returncode == 0, trained.stderr
    rows = [json.loads(line) for line in (folder / f"run_{name}" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3
    return losses
