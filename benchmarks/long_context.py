"""Memory of long context: one training step, on one process and under context parallelism.

    python -m benchmarks.long_context                      # 32,768 tokens, 4 processes; about 25 minutes on 2 cores
    python -m benchmarks.long_context --tokens 4096 --positions alibi --methods ring --record ""

A step is one of a run of train_configs/small_alibi.toml with the flavor xsmall, a row of ``--tokens`` tokens and the given
position scheme, in float32. Memory is what the profiler's allocator events add up to, from before the model is built to the
end of the step: weights, gradients, optimizer states, activations, buffers of collectives; not the interpreter. The figure
is the largest peak of a process over the peak of the run on one process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import record
from titanarch.config.load import load_config
from titanarch.train.launch import train
from titanarch.train.run_config import RunConfig

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "train_configs" / "small_alibi.toml"
FIXED = (
    "--model.flavor=xsmall",
    "--training.global_batch_size=1",
    "--training.steps=1",
    "--training.mixed_precision_param=float32",
    "--lr_scheduler.warmup_steps=0",
    "--validation.enable=false",
    "--evaluation.enable=false",
    "--checkpoint.enable=false",
    "--comm.init_timeout_seconds=7200",
    "--comm.train_timeout_seconds=7200",
)


def peak_bytes(recorded: profile) -> int:
    """The most bytes that tensors allocated since the profiler started held together."""
    assert recorded.profiler is not None, "the profiler has run"
    assert recorded.profiler.kineto_results is not None, "the profiler has stopped"
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(overrides: list[str], folder: Path) -> None:
    """The run of ``overrides`` on the processes that a launcher started; each writes its peak into ``folder``."""
    loaded = load_config(CONFIG, (*FIXED, *overrides), RunConfig)
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        train(loaded)
    found = {"peak_bytes": peak_bytes(recorded), "seconds": time.perf_counter() - started}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


def launched(overrides: list[str], n_processes: int) -> dict[str, Any]:
    """Loss of a run, the largest peak of its processes, and what each of them measured."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={n_processes}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    with tempfile.TemporaryDirectory() as name:
        arguments = [*overrides, f"--job.dump_folder={name}/run"]
        command = [sys.executable, *launcher, "-m", "benchmarks.long_context", "--worker", name, *arguments]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        processes = [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(n_processes)]
        rows = [json.loads(line) for line in (Path(name) / "run" / "metrics.jsonl").read_text().splitlines()]
        loss = next(row["loss"] for row in reversed(rows) if "loss" in row)
    return {"peak_bytes": max(each["peak_bytes"] for each in processes), "loss": loss, "processes": processes}


def compare(position: str, method: str, tokens: int, degree: int, alone: dict[str, Any]) -> dict[str, Any]:
    """One scheme and method on ``degree`` processes against ``alone``."""
    cp = [f"--parallelism.context_parallel_degree={degree}", f"--parallelism.context_parallel_method={method}"]
    shared = launched([f"--model.position.relative={position}", f"--training.seq_len={tokens}", *cp], degree)
    ratio = shared["peak_bytes"] / alone["peak_bytes"]
    mebibytes = [each["peak_bytes"] / 2**20 for each in (alone, shared)]
    print(
        f"{position}, {method}: {mebibytes[0]:.0f} MiB on one process, {mebibytes[1]:.0f} MiB on each of {degree}: {ratio:.3f}; "
        f"loss {alone['loss']:.6f} and {shared['loss']:.6f}",
        flush=True,
    )
    return {"position": position, "method": method, "ratio": ratio, "one_process": alone, "divided": shared}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        measure(sys.argv[3:], Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--degree", type=int, default=4)
    parser.add_argument("--positions", nargs="+", default=["alibi", "linear_cpb"])
    parser.add_argument("--methods", nargs="+", default=["ring", "gather", "heads"])
    parser.add_argument("--record", default="long_context", help="name of the file in benchmarks/results; empty: none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for position in options.positions:
        alone = launched([f"--model.position.relative={position}", f"--training.seq_len={options.tokens}"], 1)
        results += [compare(position, method, options.tokens, options.degree, alone) for method in options.methods]
        if options.record:
            record(options.record, results, settings=vars(options))


if __name__ == "__main__":
    main()
