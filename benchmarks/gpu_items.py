"""What benchmarks/gpu.py measures: training steps of whole models, and attention alone.

Shapes: B rows, T tokens, H heads, K head dim.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measure import compare
from torch import Tensor, nn

from titanarch.config.load import load_config
from titanarch.contract.init import Draw, Init, InitConfig, qualified_names
from titanarch.contract.model import MODELS
from titanarch.contract.position import RELATIVE_POSITIONS
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.data.batch import Batch, Windows, make_batch
from titanarch.ops.biased_attention import AttentionTokens, biased_attention
from titanarch.train.gradients import GradientClipper, LossScaler
from titanarch.train.guard import BadGradientsConfig, GradientGuard
from titanarch.train.local_optimizers import shard_of
from titanarch.train.metrics.devices import device_peak
from titanarch.train.optimizers import build_optimizers
from titanarch.train.processes import Processes, start_processes, stop_processes
from titanarch.train.resolve import resolve
from titanarch.train.run_config import RunConfig
from titanarch.train.setup import lay_out
from titanarch.train.step import TrainStep

CONFIGS = Path(__file__).parents[1] / "train_configs"
LENGTHS = (2048, 8192, 32768, 4096, 16384)
"""The ends and the middle first, should time run out."""
ROWS = {"gpt_125m": 32, "gpt_350m": 16, "gpt_1_3b": 8, "llama3_1b": 8}
"""Rows of a step, which need about 30 to 70 GiB without recomputation; halved where memory runs out."""
TINY = ("--model.n_layers=2", "--model.d_model=32", "--model.n_heads=2", "--model.vocab_size=256")
TINY_LLAMA = (*TINY, "--model.channel.d_ff=64", "--model.mixers.attention.n_kv_heads=1")
GIB = 2**30
Write = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Scale:
    """Steps before the clock and under it, a sample being ``steps_a_sample`` steps; at most ``seconds`` of them."""

    seq_len: int = 2048
    n_warmup: int = 3
    n_samples: int = 8
    steps_a_sample: int = 4
    seconds: float = 15.0


DRY = Scale(seq_len=32, n_warmup=1, n_samples=2, steps_a_sample=1)


class FastInit(Init):
    """Draws matrices on the device: for speed alone it matters little which numbers they hold, and much how long it takes."""

    @torch.no_grad()
    def fill(self, module: nn.Module, name: str, draw: Draw) -> None:
        parameter = module.get_parameter(name)
        if parameter.dim() < 2:
            super().fill(module, name, draw)
        else:
            shard_of(parameter).normal_(std=self.config.std)


def measure_model(name: str, write: Write, *, compiled: bool, dry_run: bool) -> None:
    """Steps of the model of ``train_configs/name.toml``, with half the rows as often as memory runs out."""
    rows: int | None = 2 if dry_run else ROWS[name]
    processes = start_processes(RunConfig.model_fields["comm"].get_default(call_default_factory=True))
    while rows:
        rows = _try_rows(name, rows, write, processes, compiled=compiled, dry_run=dry_run)
        gc.collect()
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()
    stop_processes()


def _try_rows(name: str, rows: int, write: Write, processes: Processes, *, compiled: bool, dry_run: bool) -> int | None:
    """Measure with ``rows`` rows a step; how many to try next where memory runs out, else None."""
    try:
        write(_measured(name, rows, processes, compiled=compiled, scale=DRY if dry_run else Scale(), dry_run=dry_run))
    except torch.OutOfMemoryError as error:
        if rows == 1:
            raise
        write({"model": name, "rows": rows, "summary": f"{name}: {rows} rows do not fit", "error": str(error)[:500]})
        return rows // 2
    return None


def _configuration(name: str, rows: int, *, compiled: bool, seq_len: int, dry_run: bool) -> RunConfig:
    overrides = [
        f"--training.seq_len={seq_len}",
        f"--training.global_batch_size={rows}",
        f"--training.local_batch_size={rows}",
        "--activation_checkpoint.mode=none",
        "--training.mixed_precision_param=bfloat16",
        f"--compile.enable={str(compiled and not dry_run).lower()}",
    ]
    if dry_run:
        overrides += TINY_LLAMA if name.startswith("llama") else TINY
    config = load_config(CONFIGS / f"{name}.toml", overrides, RunConfig).config
    return resolve(config, seed=0, device_type="cpu" if dry_run else "cuda")


def _train_step(config: RunConfig, processes: Processes, vocab_size: int) -> TrainStep:
    """The trainer's step on a model with weights drawn on the device."""
    laid_out = lay_out(config, vocab_size, world_size=1, device_type=processes.device.type)
    model = laid_out.model.to_empty(device=processes.device)
    model.reset_parameters(FastInit(InitConfig(), names=laid_out.names, seed=0, n_layers=sum(1 for _ in model.blocks())))
    scaler = LossScaler(enabled=False)
    return TrainStep(
        model,
        build_optimizers(config.optimizer, model.named_parameters(), laid_out.roles, laid_out.growth),
        clipper=GradientClipper(model.parameters(), config.training.max_norm),
        scaler=scaler,
        guard=GradientGuard(BadGradientsConfig(), scaler),
        mesh=laid_out.mesh,
        device=processes.device,
        seed=0,
        z_weight=0.0,
    )


def _random_batches(n: int, rows: int, seq_len: int, vocab_size: int, *, pinned: bool) -> list[Batch]:
    """Rows of one document each, every batch another."""
    generator = np.random.default_rng(0)
    none = np.empty(0, dtype=np.int64)
    batches = [
        make_batch(Windows(generator.integers(0, vocab_size, (rows, seq_len + 1)), none, none, np.arange(i * rows, (i + 1) * rows)))
        for i in range(n)
    ]
    return [batch.pin_memory() for batch in batches] if pinned else batches


def _measured(name: str, rows: int, processes: Processes, *, compiled: bool, scale: Scale, dry_run: bool) -> dict[str, Any]:
    config = _configuration(name, rows, compiled=compiled, seq_len=scale.seq_len, dry_run=dry_run)
    on_gpu = processes.device.type == "cuda"
    synchronize: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    vocab_size = getattr(config.model, "vocab_size", None)
    assert isinstance(vocab_size, int), f"{name}.toml gives the size of its vocabulary"
    cost = MODELS.of(config.model).cost(config.model, vocab_size, scale.seq_len)
    train_step = _train_step(config, processes, vocab_size)
    batches = _random_batches(8, rows, scale.seq_len, vocab_size, pinned=on_gpu)
    losses: list[Tensor] = []
    samples: list[float] = []

    def advance(n: int) -> None:
        for _ in range(n):
            losses.append(train_step(len(losses) + 1, [batches[len(losses) % len(batches)]]).loss)

    started = time.perf_counter()
    advance(scale.n_warmup)
    synchronize()
    warmup_seconds, started = time.perf_counter() - started, time.perf_counter()
    while len(samples) < scale.n_samples and (not samples or time.perf_counter() - started < scale.seconds):
        before = time.perf_counter()
        advance(scale.steps_a_sample)
        synchronize()
        samples.append((time.perf_counter() - before) / scale.steps_a_sample)
    train_step.guard.check()
    tokens_per_second = rows * scale.seq_len / median(samples)
    peak = device_peak(processes.device, torch.bfloat16, tf32=False)
    mfu = None if peak is None else cost.training_flops_per_token * tokens_per_second / peak
    shown_mfu = "unknown" if mfu is None else f"{100 * mfu:.1f} %"
    return {
        "model": name,
        "compiled": compiled,
        "summary": f"{name}, compiled: {compiled}, {rows} rows: {tokens_per_second:.0f} tokens/s, MFU {shown_mfu}",
        "parameters": cost.parameters,
        "training_flops_per_token": cost.training_flops_per_token,
        "rows": rows,
        "seq_len": scale.seq_len,
        "tokens_per_second": tokens_per_second,
        "mfu": mfu,
        "peak_flops_per_second": peak,
        "warmup_seconds": warmup_seconds,
        "step_seconds": samples,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
        "losses": torch.stack(losses).tolist(),
    }


def measure_attention(kind: str, length: int, write: Write, *, dry_run: bool) -> None:
    """Forward and backward of attention with the position scheme ``kind`` against plain causal attention.

    32,768 tokens in rows of ``length``, 16 heads of 128 channels, bf16; making the table, and its gradient where it is
    learned, is part of the time.
    """
    device = torch.device("cpu" if dry_run else "cuda")
    n_tokens, n_heads, head_dim = (128, 2, 16) if dry_run else (32768, 16, 128)
    length = length // 256 if dry_run else length
    shape = (n_tokens // length, length, n_heads, head_dim)
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    upstream = torch.randn(shape, device=device, dtype=torch.bfloat16)
    whole = AttentionTokens(torch.arange(length, device=device), torch.zeros(shape[:2], dtype=torch.int64, device=device))
    position_config = RELATIVE_POSITIONS.resolve(kind)
    model_shape = ModelShape(d_model=n_heads * head_dim, vocab_size=256, seq_len=length, layers=("attention",))
    position = RELATIVE_POSITIONS.of(position_config)(position_config, model_shape, 0, n_heads, head_dim)
    position.reset_parameters(Init(InitConfig(), names=qualified_names(position), seed=0, n_layers=1))
    position.to(device)
    leaves = [q, k, v]

    def train(table_HN: Tensor | None, inputs: list[Tensor]) -> None:
        y, _ = biased_attention(q, k, v, query=whole, key=whole, scale=head_dim**-0.5, table_HN=table_HN, packed=False)
        torch.autograd.grad(y, inputs, upstream)

    def plain() -> None:
        train(None, leaves)

    def biased() -> None:
        train(position(length, False, Carry.empty())[0], [*leaves, *position.parameters()])

    synchronize: Callable[[], None] = (lambda: None) if dry_run else torch.cuda.synchronize
    seconds = max(_seconds(plain, synchronize), _seconds(biased, synchronize))
    repeats = 1 if dry_run else max(1, int(0.02 / seconds))
    n_rounds = 2 if dry_run else min(max(int(3.0 / (8 * repeats * seconds)), 2), 10)
    result = compare(
        (f"plain causal, T={length}", partial(_repeat, plain, repeats)),
        (f"{kind}, T={length}", partial(_repeat, biased, repeats)),
        n_rounds=n_rounds,
        synchronize=synchronize,
    )
    summary = f"{result.summary()} ({repeats} a call); {kind} takes {result.wall_speedup.median:.2f} x the time"
    write({"position": kind, "length": length, "repeats_a_call": repeats, "summary": summary, **asdict(result)})


def _repeat(program: Callable[[], None], n: int) -> None:
    for _ in range(n):
        program()


def _seconds(program: Callable[[], None], synchronize: Callable[[], None]) -> float:
    """Of the third call: the first one compiles."""
    for _ in range(2):
        program()
    synchronize()
    started = time.perf_counter()
    program()
    synchronize()
    return time.perf_counter() - started
