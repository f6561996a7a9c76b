"""How right ``titanarch plan`` is: predicted memory and traffic against a real run of the same configuration.

    python -m benchmarks.plan_accuracy [--layouts fsdp tp cp]

Four gloo processes of this machine make two training steps. Memory: the profiler's allocator events of process 0, from before the
model is allocated, so neither the interpreter nor the libraries are in it. Traffic: every collective that passes the dispatcher.
Writes results/plan_accuracy.json.
"""

import argparse
import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import record
from titanarch.config.load import load_config
from titanarch.plan.fit import vocab_size_of
from titanarch.plan.ledger import Ledger
from titanarch.plan.trace import axis_names, synthetic_batch, trace_step
from titanarch.train.gradients import GradientClipper, LossScaler
from titanarch.train.guard import BadGradientsConfig, GradientGuard
from titanarch.train.optimizers import build_optimizers
from titanarch.train.processes import Processes
from titanarch.train.resolve import local_batch_size, resolve
from titanarch.train.run_config import RunConfig
from titanarch.train.setup import build_model
from titanarch.train.step import TrainStep

WORLD_SIZE = 4
CONFIG = """
[job]
dump_folder = "unused"
[model]
name = "decoder"
n_layers = 8
d_model = 256
n_heads = 4
channel = { kind = "mlp", activation = "gelu" }
position = { relative = "alibi" }
[training]
seq_len = 2048
global_batch_size = 16
steps = 2
mixed_precision_param = "float32"
[optimizer]
name = "AdamW"
lr = 1e-3
"""
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "tp": {"parallelism.tensor_parallel_degree": 2, "training.global_batch_size": 16},
    "cp": {"parallelism.context_parallel_degree": 2, "training.global_batch_size": 16},
    "fsdp, recomputed": {"activation_checkpoint.mode": "full", "training.global_batch_size": 48},
}


def configuration(layout: str, folder: Path) -> RunConfig:
    """The configuration of a layout, resolved for a CPU."""
    path = folder / "run.toml"
    path.write_text(CONFIG)
    overrides = [f"--{key}={value}" for key, value in LAYOUTS[layout].items()]
    return resolve(load_config(path, overrides, RunConfig).config, seed=0, device_type="cpu")


def allocator_peak(profiled: profile) -> int:
    """Bytes: the most that was allocated at once, of what was allocated under the profiler."""
    alive = peak = 0
    assert profiled.profiler is not None, "it has run"
    assert profiled.profiler.kineto_results is not None, "it has ended"
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()  # type: ignore[attr-defined]
            peak = max(peak, alive)
    return peak


def measured(config: RunConfig, vocab_size: int) -> dict[str, Any]:
    """Two real steps on this process of the default group: allocator peak, bytes sent by axis in the second."""
    processes = Processes(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        built = build_model(config, processes, vocab_size)
        optimizers = build_optimizers(config.optimizer, built.model.named_parameters(), built.roles, built.growth)
        scaler = LossScaler(enabled=False)
        step = TrainStep(
            built.model,
            optimizers,
            clipper=GradientClipper(built.model.parameters(), config.training.max_norm),
            scaler=scaler,
            guard=GradientGuard(BadGradientsConfig(), scaler),
            mesh=built.mesh,
            device=torch.device("cpu"),
            seed=0,
            z_weight=0.0,
        )
        rows = local_batch_size(config, built.mesh.degrees.data_parallel)
        n = config.training.global_batch_size // (rows * built.mesh.degrees.data_parallel)
        batches = [synthetic_batch(rows, config.training.seq_len) for _ in range(n)]
        step(1, batches)
        with Ledger() as ledger:
            step(2, batches)
    axes, sent = axis_names(built.mesh), dict.fromkeys(("dp_shard_cp", "cp", "tp"), 0.0)
    for (_, group, _), n_bytes in ledger.sent.items():
        axis = axes.get(group, "world")
        sent[axis] = sent.get(axis, 0.0) + n_bytes
    return {"peak_bytes": allocator_peak(profiled), "sent_bytes": sent}


def _rank(rank: int, store: str, config: RunConfig, vocab_size: int, writer: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=FileStore(store, WORLD_SIZE), rank=rank, world_size=WORLD_SIZE)
    found = measured(config, vocab_size)
    if rank == 0:
        writer.send(found)
    dist.destroy_process_group()


def compare(layout: str) -> dict[str, Any]:
    """Predicted and measured numbers of one layout, and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(layout, Path(folder))
        vocab_size = vocab_size_of(config)
        context = multiprocessing.get_context("spawn")
        reader, writer = context.Pipe(duplex=False)
        ranks = [
            context.Process(target=_rank, args=(rank, str(Path(folder, "store")), config, vocab_size, writer)) for rank in range(WORLD_SIZE)
        ]
        for process in ranks:
            process.start()
        real = reader.recv()
        for process in ranks:
            process.join()
    trace = trace_step(config, vocab_size, world_size=WORLD_SIZE, device_type="cpu")
    sent = {axis: trace.sent_bytes(axis) for axis in trace.formulas}
    return {
        "layout": layout,
        "predicted_peak_bytes": trace.peak.total,
        "predicted_by_category": trace.peak.by_category,
        "measured_peak_bytes": real["peak_bytes"],
        "predicted_over_measured": trace.peak.total / real["peak_bytes"],
        "traced_sent_bytes": sent,
        "formula_sent_bytes": trace.formulas,
        "measured_sent_bytes": {axis: real["sent_bytes"][axis] for axis in sent},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted memory and traffic against a real run of four processes.")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    results = []
    for layout in parser.parse_args().layouts:
        found = compare(layout)
        results.append(found)
        gib = 2**30
        print(
            f"{layout}: predicted {found['predicted_peak_bytes'] / gib:.3f} GiB, measured {found['measured_peak_bytes'] / gib:.3f} GiB "
            f"({100 * (found['predicted_over_measured'] - 1):+.1f} %)",
            flush=True,
        )
        for axis, n_bytes in found["measured_sent_bytes"].items():
            formula, traced = found["formula_sent_bytes"][axis], found["traced_sent_bytes"][axis]
            print(f"  {axis}: sent {n_bytes:.0f}, traced {traced:.0f}, formula {formula:.0f}", flush=True)
    record("plan_accuracy", results, settings={"world_size": WORLD_SIZE, "config": CONFIG, "layouts": LAYOUTS})


if __name__ == "__main__":
    main()
