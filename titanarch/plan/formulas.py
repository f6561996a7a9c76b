"""Closed formulas of what a process sends in a step, from sizes and degrees alone: what a trace is held against.

With n, t, c processes on an axis, b rows, T tokens of a process before tensor parallelism divides them, e bytes an element of
compute, r of gradients' sums, P parameters of an FSDP unit that a process holds once gathered:

- FSDP2: a gather a micro-batch, e P (n-1)/n, another in the backward where the unit was freed, and once a step the sum,
  r P (n-1)/n; so 6 P (n-1)/n in bfloat16 throughout. Over replicas, 2 r P/n (m-1)/m.
- tensor parallelism, u = b T d e (t-1)/t: a mixer or channel costs 2u forward and 2u backward, with tokens divided between
  them or not (arXiv:2205.05198), and its recomputation what precedes its last product; embedding and head 2u each; the loss
  three numbers a token; parameters that are whole on every process the sum of their gradients.
- context parallelism, with k and v of w = b T H_kv d_h e each: gather w (c-1) forward and as much backward for each of the two;
  heads (c-1)/c of every stream and of the result, either way; ring (c-1) w forward, (c-1) w and c times the gradient in
  float32 backward for each of the two.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from titanarch.contract.channel import ChannelMixer
from titanarch.contract.mixer import BaseMixer, SequenceMixer
from titanarch.contract.model import Model
from titanarch.contract.split import ContextParallel
from titanarch.models.mixers.attention import Attention
from titanarch.parallel.check import decide_division
from titanarch.parallel.fsdp import fp32_modules
from titanarch.parallel.mesh import Degrees
from titanarch.parallel.vocabulary import DividedVocabulary
from titanarch.train.resolve import DTYPES, param_dtype
from titanarch.train.run_config import RunConfig
from titanarch.train.setup import LaidOut

FP32_BYTES = 4


@dataclass(frozen=True)
class Sizes:
    """What the formulas are of. ``rows``: of a micro-batch; ``tokens``: of a row on this process, before tensor parallelism."""

    rows: int
    tokens: int
    seq_len: int
    n_micro_batches: int
    compute_bytes: int
    reduce_bytes: int
    degrees: Degrees
    sequence_parallel: bool
    recomputes: bool
    """Whether whole blocks are recomputed in the backward."""
    frees_blocks: bool
    """Whether FSDP frees a block's weights between its forward and its backward."""


def sizes_of(config: RunConfig, degrees: Degrees, *, rows: int, n_micro_batches: int) -> Sizes:
    training = config.training
    return Sizes(
        rows=rows,
        tokens=training.seq_len // degrees.cp,
        seq_len=training.seq_len,
        n_micro_batches=n_micro_batches,
        compute_bytes=param_dtype(config).itemsize,
        reduce_bytes=DTYPES[training.mixed_precision_reduce].itemsize,
        degrees=degrees,
        sequence_parallel=config.parallelism.enable_sequence_parallel,
        recomputes=config.activation_checkpoint.mode == "full",
        frees_blocks=config.parallelism.fsdp_reshard_after_forward != "never",
    )


def formula_bytes(config: RunConfig, built: LaidOut, *, rows: int, n_micro_batches: int) -> dict[str, float | None]:
    """Bytes that a process sends a step along each axis of degree above 1; None where there is no formula."""
    degrees, model = built.mesh.degrees, built.model
    sizes = sizes_of(config, degrees, rows=rows, n_micro_batches=n_micro_batches)
    whole_blocks = config.activation_checkpoint.mode in ("none", "full")
    found: dict[str, float | None] = {}
    if degrees.dp_shard * degrees.cp > 1:
        found["dp_shard_cp"] = sum(_unit_bytes(unit, sizes) for unit in _units(model))
    if degrees.dp_replicate > 1:
        found["dp_replicate"] = sum(_replica_bytes(unit, sizes) for unit in _units(model))
    if degrees.cp > 1:
        methods = decide_division(
            model, config.parallelism, degrees, seq_len=config.training.seq_len, device_type=built.mesh.weights.device_type
        ).methods
        found["cp"] = _context_bytes(model, methods, sizes) if whole_blocks else None
    if degrees.tp > 1:
        found["tp"] = _tensor_bytes(model, sizes) if whole_blocks else None
    return found


@dataclass(frozen=True)
class _Unit:
    """An FSDP unit: its own parameters, whether it computes in fp32, and whether it is a block."""

    parameters: list[nn.Parameter]
    fp32: bool
    is_block: bool


def _units(model: Model) -> Iterator[_Unit]:
    blocks = set(model.blocks())
    kept_fp32 = set(fp32_modules(model))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            inner = {p for child in module.modules() if child is not module and isinstance(child, FSDPModule) for p in child.parameters()}
            own = [p for p in module.parameters() if p not in inner]
            yield _Unit(own, module in kept_fp32, module in blocks)


def _gathered_numel(parameter: nn.Parameter, n: int) -> float:
    """Elements that a process holds of it once gathered, padded to a multiple of ``n`` along dimension 0."""
    assert isinstance(parameter, DTensor), "FSDP divides every parameter"
    shape = list(parameter.shape)
    names = parameter.device_mesh.mesh_dim_names or ()
    for axis, name in enumerate(names):
        placement = parameter.placements[axis]
        if name == "tp" and placement.is_shard():
            shape[placement.dim] //= parameter.device_mesh.size(axis)  # type: ignore[attr-defined]
    first, rest = (shape[0], shape[1:]) if shape else (1, [])
    return math.ceil(first / n) * n * math.prod(rest)


def _unit_bytes(unit: _Unit, sizes: Sizes) -> float:
    n = sizes.degrees.dp_shard * sizes.degrees.cp
    numel = sum(_gathered_numel(p, n) for p in unit.parameters)
    element, summed = (FP32_BYTES, FP32_BYTES) if unit.fp32 else (sizes.compute_bytes, sizes.reduce_bytes)
    n_gathers = 2 if unit.is_block and sizes.frees_blocks else 1
    return numel * (n - 1) / n * (element * n_gathers * sizes.n_micro_batches + summed)


def _replica_bytes(unit: _Unit, sizes: Sizes) -> float:
    n, m = sizes.degrees.dp_shard * sizes.degrees.cp, sizes.degrees.dp_replicate
    numel = sum(_gathered_numel(p, n) for p in unit.parameters) / n
    return 2 * (m - 1) / m * numel * (FP32_BYTES if unit.fp32 else sizes.reduce_bytes)


def _tensor_bytes(model: Model, sizes: Sizes) -> float:
    t, d = sizes.degrees.tp, model.get_parameter("embedding.weight").shape[1]
    share = (t - 1) / t
    unit = sizes.rows * sizes.tokens * d * sizes.compute_bytes * share
    n_mixers = sum(isinstance(module, SequenceMixer) for module in model.modules())
    n_channels = sum(isinstance(module, ChannelMixer) for module in model.modules())
    total = 4 * unit * (n_mixers + n_channels)
    if sizes.recomputes:
        # Recomputation ends with the last product of the block: the sum behind it is not made again.
        total += (2 * n_mixers + 2 * n_channels - (1 if sizes.sequence_parallel else 2) * _blocks(model)) * unit
    if isinstance(model.vocabulary, DividedVocabulary):
        total += 4 * unit + 2 * share * 3 * FP32_BYTES * sizes.rows * sizes.tokens
    total *= sizes.n_micro_batches
    once = sizes.reduce_bytes if sizes.n_micro_batches > 1 else sizes.compute_bytes
    total += 2 * share * sum(p.numel() for p in model.parameters() if _is_whole(p)) * once
    tables = sum(_table_elements(module, sizes.seq_len) for module in model.modules())
    return total + 2 * share * tables * FP32_BYTES * sizes.n_micro_batches


def _blocks(model: Model) -> int:
    return sum(1 for _ in model.blocks())


def _is_whole(parameter: nn.Parameter) -> bool:
    """Whether it is held whole on every process of the tensor axis, and used in parts."""
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return "tp" in names and parameter.placements[names.index("tp")].is_replicate()


def _table_elements(module: nn.Module, seq_len: int) -> int:
    """What a mixer reads by head and trains: its gradient is summed over the heads of all processes."""
    if not isinstance(module, Attention):
        return 0
    learned = any(position.learned_table for position in module.relative_positions())
    return module.config.n_heads * ((seq_len if learned else 0) + int(module.config.sinks))


def _context_bytes(model: Model, methods: tuple[ContextParallel | None, ...], sizes: Sizes) -> float | None:
    total = 0.0
    mixers = [module for module in model.modules() if isinstance(module, BaseMixer)]
    for mixer, method in zip(mixers, methods, strict=True):
        if not isinstance(mixer, Attention) or method is None:
            return None
        one = attention_bytes(mixer, method, sizes)
        if one is None:
            return None
        forward, backward = one
        total += forward * (2 if sizes.recomputes else 1) + backward
    return total * sizes.n_micro_batches


def attention_bytes(mixer: Attention, method: ContextParallel, sizes: Sizes) -> tuple[float, float] | None:
    """Forward and backward of one layer."""
    c, t = sizes.degrees.cp, sizes.degrees.tp
    n_query, n_key = mixer.config.n_heads // t, mixer.config.kv_heads()
    if n_key % t:
        return None
    n_key //= t
    maps, key_maps = mixer.config.maps, mixer.config.key_maps
    head = sizes.rows * sizes.tokens * mixer.head_dim  # elements of one query
    keys = 2 * head * n_key * key_maps
    passed = float(keys * sizes.compute_bytes * (c - 1))
    if method is ContextParallel.GATHER:
        return passed, passed
    if method is ContextParallel.RING:
        return passed, passed + keys * FP32_BYTES * c
    if method is ContextParallel.HEADS:
        query = (1 + key_maps) * head * n_query * maps * sizes.compute_bytes * (c - 1) / c
        sent = query + keys * sizes.compute_bytes * ((c - 1) / c if n_key % c == 0 else c - 1)
        return sent, sent
    return None
