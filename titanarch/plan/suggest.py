"""Layouts ranked by a predicted step time: an analytic model of memory and time, calibrated by a few small traces.

Traced (two depths of the model, each mode of activation checkpointing, one micro-batch of one row, FSDP2 alone): activations a
layer and beside the layers, what FSDP2 gathers, bytes of optimizer states a parameter. Analytic: how these scale with degrees
and rows, all communication (``plan.formulas``' arithmetic without its small terms), and the time.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from titanarch.config.errors import ConfigError, Problem
from titanarch.contract.cost import Cost
from titanarch.contract.mixer import BaseMixer
from titanarch.contract.model import MODELS, Model
from titanarch.models.decoder_config import DecoderConfig
from titanarch.models.mixers.attention import Attention
from titanarch.parallel.check import Division, decide_division
from titanarch.parallel.mesh import Degrees, resolve_degrees
from titanarch.plan.devices import Device
from titanarch.plan.fit import GIB, changed, vocab_size_of
from titanarch.plan.formulas import Sizes, attention_bytes, sizes_of
from titanarch.plan.ledger import ACTIVATIONS, GATHERED, OPTIMIZER, OTHER, PARAMETERS
from titanarch.plan.plan import capacity_bytes, recomputed_share, resolved_for
from titanarch.plan.predict import StepTime, step_time
from titanarch.plan.trace import Traffic, trace_step
from titanarch.train.check import meta_model
from titanarch.train.local_batch import row_choices
from titanarch.train.resolve import param_dtype
from titanarch.train.run_config import RunConfig

MODES = ("none", "full")
MOST_SHOWN = 8
MOST_ROWS_TRIED = 6


@dataclass(frozen=True)
class Suggestion:
    """A layout: the keys to paste, its predicted step time and peak (analytic)."""

    degrees: Degrees
    mode: str
    rows: int
    n_micro_batches: int
    time: StepTime
    peak_bytes: float

    def toml(self) -> str:
        d = self.degrees
        lines = ["[parallelism]", f"data_parallel_replicate_degree = {d.dp_replicate}", f"data_parallel_shard_degree = {d.dp_shard}"]
        lines += [f"context_parallel_degree = {d.cp}", f"tensor_parallel_degree = {d.tp}"]
        return "\n".join([*lines, "[training]", f"local_batch_size = {self.rows}", "[activation_checkpoint]", f'mode = "{self.mode}"'])


@dataclass(frozen=True)
class Calibration:
    """Of one row of whole length on one process, in bytes: activations of a layer, those beside the layers, gathered weights."""

    a_layer: float
    beside: float
    gathered: float


@dataclass(frozen=True)
class Setting:
    """What candidates share."""

    config: RunConfig
    model: Model
    cost: Cost
    device: Device
    world_size: int
    n_layers: int
    state_bytes_a_parameter: float
    calibrations: dict[str, Calibration]


def suggest(config: RunConfig, *, world_size: int, device: Device) -> list[Suggestion]:
    """Layouts of ``config`` on ``world_size`` processes of ``device`` that are predicted to fit, fastest first.

    ConfigError where the model is none that layers can be taken from, or no layout divides it and fits.
    """
    config = resolved_for(config, device)
    if not isinstance(config.model, DecoderConfig):
        raise ConfigError(Problem(f"--suggest knows the decoder's layers; plan '{config.model.kind}' layout by layout", "model.name"))
    vocab_size = vocab_size_of(config)
    model = meta_model(config, vocab_size)
    cost = MODELS.of(config.model).cost(config.model, vocab_size, config.training.seq_len)
    calibrations, state_bytes = _calibrate(config, config.model, vocab_size, device)
    shared = Setting(config, model, cost, device, world_size, config.model.n_layers, state_bytes, calibrations)
    found = [s for degrees in layouts(config, model, world_size, device) for s in _of_layout(shared, *degrees)]
    if not found:
        capacity = capacity_bytes(device, world_size) / GIB
        raise ConfigError(f"no layout on {world_size} processes is predicted to fit into {capacity:.1f} GiB each; use more processes")
    return sorted(found, key=lambda s: (s.time.total, s.peak_bytes))


def layouts(config: RunConfig, model: Model, world_size: int, device: Device) -> Iterator[tuple[Degrees, Division]]:
    """Every division of the processes that the model's declarations allow."""
    for tp in _powers(min(device.n_in_node, world_size)):
        for cp in _powers(world_size // tp):
            rest = world_size // (tp * cp)
            if world_size % (tp * cp) or config.training.global_batch_size % rest:
                continue
            for replicate in {1, *(rest // n for n in _powers(rest) if rest % n == 0 and n * tp * cp >= device.n_in_node)}:
                change = {
                    "parallelism.tensor_parallel_degree": tp,
                    "parallelism.context_parallel_degree": cp,
                    "parallelism.data_parallel_replicate_degree": replicate,
                    "parallelism.data_parallel_shard_degree": -1,
                }
                other = changed(config, change)
                try:
                    degrees = resolve_degrees(other.parallelism, world_size)
                    yield (
                        degrees,
                        decide_division(model, other.parallelism, degrees, seq_len=config.training.seq_len, device_type=device.device_type),
                    )
                except ConfigError:
                    continue


def _powers(most: int) -> list[int]:
    return [1 << k for k in range(most.bit_length()) if 1 << k <= most]


def _calibrate(config: RunConfig, model: DecoderConfig, vocab_size: int, device: Device) -> tuple[dict[str, Calibration], float]:
    """By mode; and bytes of optimizer states a parameter."""
    period, found, state_bytes = len(model.layers), {}, 0.0
    plain = changed(
        config,
        {
            "parallelism.tensor_parallel_degree": 1,
            "parallelism.context_parallel_degree": 1,
            "parallelism.data_parallel_replicate_degree": 1,
            "parallelism.data_parallel_shard_degree": -1,
            "training.global_batch_size": device.n_in_node if device.device_type == "cuda" else 2,
            "training.local_batch_size": 1,
        },
    )
    world_size = plain.training.global_batch_size
    for mode in MODES:
        peaks = []
        for n_layers in (period, 3 * period):
            small = changed(plain, {"activation_checkpoint.mode": mode, "model.n_layers": n_layers})
            trace = trace_step(small, vocab_size, world_size=world_size, device_type=device.device_type)
            peaks.append(trace.peak.by_category)
            state_bytes = trace.state_bytes[OPTIMIZER] / trace.state_bytes[PARAMETERS] * 4
        shallow, deep = peaks
        used = [p[ACTIVATIONS] + p[OTHER] for p in peaks]
        a_layer = max(used[1] - used[0], 0) / (2 * period)
        gathered = max(shallow[GATHERED], deep[GATHERED])
        found[mode] = Calibration(a_layer, max(used[0] - period * a_layer, 0.0), gathered)
    return found, state_bytes


def _of_layout(shared: Setting, degrees: Degrees, division: Division) -> Iterator[Suggestion]:
    """The fastest micro-batch that fits, of each mode."""
    capacity = capacity_bytes(shared.device, shared.world_size)
    rows_of_step = shared.config.training.global_batch_size // degrees.data_parallel
    for mode in MODES:
        for rows in row_choices(rows_of_step)[-MOST_ROWS_TRIED:] if rows_of_step > 1 else [1]:
            n_micro_batches = rows_of_step // rows
            peak = peak_bytes(shared, degrees, mode=mode, rows=rows, n_micro_batches=n_micro_batches)
            if peak > capacity:
                continue
            time = _time(shared, degrees, division, mode=mode, rows=rows, n_micro_batches=n_micro_batches)
            yield Suggestion(degrees, mode, rows, n_micro_batches, time, peak)
            break  # fewer rows only send more


def peak_bytes(shared: Setting, degrees: Degrees, *, mode: str, rows: int, n_micro_batches: int) -> float:
    """Predicted peak of a process (analytic)."""
    found, held = shared.calibrations[mode], shared.cost.parameters / degrees.tp
    states = held / (degrees.dp_shard * degrees.cp) * (4 + 4 + shared.state_bytes_a_parameter)
    tokens = rows / (degrees.cp * degrees.tp)
    activations = tokens * (found.a_layer * shared.n_layers + found.beside)
    sums = 4 * held if n_micro_batches > 1 else 0.0
    return states + activations + found.gathered / degrees.tp + sums


def _time(shared: Setting, degrees: Degrees, division: Division, *, mode: str, rows: int, n_micro_batches: int) -> StepTime:
    config = changed(shared.config, {"activation_checkpoint.mode": mode})
    sizes = sizes_of(config, degrees, rows=rows, n_micro_batches=n_micro_batches)
    tokens = config.training.global_batch_size * config.training.seq_len
    held = shared.cost.parameters / degrees.tp
    return step_time(
        training_flops=shared.cost.training_flops_per_token * tokens / shared.world_size,
        recomputed_share=recomputed_share(config),
        traffic=_traffic(shared, sizes, division),
        state_bytes=held / (degrees.dp_shard * degrees.cp) * (8 + shared.state_bytes_a_parameter),
        degrees=degrees,
        device=shared.device,
        dtype=param_dtype(config),
    )


def _traffic(shared: Setting, sizes: Sizes, division: Division) -> Iterable[Traffic]:
    """Without the small terms: norms, scalars, tables."""
    d, held = sizes.degrees, shared.cost.parameters / sizes.degrees.tp
    n, m = d.dp_shard * d.cp, d.dp_replicate
    gathers = 2 * sizes.compute_bytes * sizes.n_micro_batches
    yield Traffic("dp_shard_cp", "all", held * (n - 1) / n * (gathers + sizes.reduce_bytes), 0)
    yield Traffic("dp_replicate", "all", 2 * held / n * (m - 1) / m * sizes.reduce_bytes, 0)
    unit = sizes.rows * sizes.tokens * shared.model.get_parameter("embedding.weight").shape[1] * sizes.compute_bytes * (d.tp - 1) / d.tp
    yield Traffic("tp", "all", unit * sizes.n_micro_batches * (4 + shared.n_layers * (11 if sizes.recomputes else 8)), 0)
    mixers = [module for module in shared.model.modules() if isinstance(module, BaseMixer)]
    for mixer, method in zip(mixers, division.methods, strict=True):
        if isinstance(mixer, Attention) and method is not None:
            sent = attention_bytes(mixer, method, sizes)
            if sent is not None:
                forward, backward = sent
                yield Traffic("cp", "all", sizes.n_micro_batches * (forward * (2 if sizes.recomputes else 1) + backward), 0)


def suggestions_text(found: list[Suggestion], *, world_size: int, device: str) -> str:
    """A table of the best, and the TOML lines of each of the first three."""
    lines = [
        f"layouts on {world_size} x {device}, fastest first: predicted, nothing was run",
        "all numbers are analytic: activations of a layer were traced at two depths and scaled; check one by titanarch plan",
        f"  {'step s':>8} {'peak GiB':>9}  {'dp_replicate':>12} {'dp_shard':>8} {'cp':>4} {'tp':>4} {'rows':>5} {'micro-batches':>13}"
        "  recompute",
    ]
    for s in found[:MOST_SHOWN]:
        d = s.degrees
        lines.append(
            f"  {s.time.total:>8.3f} {s.peak_bytes / GIB:>9.2f}  {d.dp_replicate:>12} {d.dp_shard:>8} {d.cp:>4} {d.tp:>4} {s.rows:>5} "
            f"{s.n_micro_batches:>13}  {s.mode}"
        )
    for number, s in enumerate(found[:3], 1):
        lines += ["", f"# {number}: {s.time.total:.3f} s a step, {s.peak_bytes / GIB:.2f} GiB (analytic)", s.toml()]
    return "\n".join(lines) + "\n"


__all__ = ["Suggestion", "layouts", "suggest", "suggestions_text"]
