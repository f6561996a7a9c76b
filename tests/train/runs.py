"""Starts real runs in processes of their own, as the launcher does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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


def command(config: Path, *overrides: str, n_processes: int = 1) -> list[str]:
    """The command that trains ``config``."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={n_processes}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return [sys.executable, *(launcher if n_processes > 1 else []), "-m", "titanarch", "train", "--config", str(config), *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def train(config: Path, *overrides: str, n_processes: int = 1, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Train to the end; fails with the output where the exit status is another."""
    done = subprocess.run(
        command(config, *overrides, n_processes=n_processes), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def train_and_kill(config: Path, folder: Path, after_step: int, *overrides: str) -> None:
    """Train, and kill -9 once the row of ``after_step`` is written."""
    process = subprocess.Popen(
        command(config, *overrides),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["step"] >= after_step for row in rows(folder)):
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"


def rows(folder: Path) -> list[dict[str, Any]]:
    """The complete rows of a run's metrics."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step."""
    return {row["step"]: row["loss"] for row in rows(folder) if "loss" in row}
