"""Recurrent mixers train on long rows: the largest memory of a whole model's process, each mixer's file at size xsmall.

    python -m benchmarks.long_rows                                    # rows of 32,768 tokens, one thread; half an hour
    python -m benchmarks.long_rows --only mamba2 --tokens 2048 --record ""

A batch is one row, taken whole; every block keeps its inputs alone (full activation checkpointing). Memory is the largest resident set
of the process as its result tells it, the interpreter and the optimizer included. Times are of a machine that may do other work.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import record

ROOT = Path(__file__).resolve().parents[1]
MIXERS = ("mamba2", "gla", "retnet", "gated_delta_net", "kda", "rwkv7")


def train(name: str, *, n_tokens: int, n_steps: int, flavor: str) -> dict[str, Any]:
    """What a run of ``name``.toml of train_configs/architectures says of itself."""
    with tempfile.TemporaryDirectory(prefix=f"long-rows-{name}-") as folder:
        settings = {
            "job.dump_folder": folder,
            "model.flavor": flavor,
            "training.seq_len": n_tokens,
            "training.global_batch_size": 1,
            "training.steps": n_steps,
            "activation_checkpoint.mode": "full",
            "lr_scheduler.warmup_steps": 1,
            "metrics.log_freq": 1,
            "checkpoint.enable": "false",
            "validation.enable": "false",
            "evaluation.enable": "false",
        }
        options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        config = ROOT / "train_configs" / "architectures" / f"{name}.toml"
        command = [sys.executable, "-m", "titanarch", "train", "--config", str(config), *options]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        result = json.loads(Path(folder, "result.json").read_text("utf-8"))
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text("utf-8").splitlines()]
    kept = ("tokens", "parameters", "non_embedding_parameters", "peak_memory_gib", "train_seconds")
    return {"mixer": name, "losses": [row["loss"] for row in rows if "loss" in row], **{key: result[key] for key in kept}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=MIXERS, choices=MIXERS)
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens a row")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--flavor", default="xsmall", help="size of the model")
    parser.add_argument("--record", default="long_rows", help="name in benchmarks/results; empty: none")
    options = parser.parse_args()
    results = []
    for name in options.only:
        found = train(name, n_tokens=options.tokens, n_steps=options.steps, flavor=options.flavor)
        print(f"{name}: {found['peak_memory_gib']:.2f} GiB, losses {', '.join(f'{loss:.3f}' for loss in found['losses'])}", flush=True)
        results.append(found)
    if options.record:
        print(record(options.record, results, settings=vars(options)))


if __name__ == "__main__":
    main()
