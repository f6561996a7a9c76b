"""Which techniques a model can be divided by, decided from its declarations before anything is launched."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from titanarch.config.errors import ConfigError, Problem
from titanarch.contract.channel import Activation, ChannelMixer
from titanarch.contract.layers import HeadNorm
from titanarch.contract.linear import LinearLayer
from titanarch.contract.mixer import BaseMixer, LocalMixer, SequenceMixer
from titanarch.contract.model import Model
from titanarch.contract.split import ContextParallel
from titanarch.parallel.config import ActivationCheckpointConfig, CompileConfig, Float8Config, ParallelismConfig
from titanarch.parallel.context_parallel import choose_method, uses_head_tail
from titanarch.parallel.float8 import float8_problems
from titanarch.parallel.mesh import Degrees


@dataclass(frozen=True)
class Division:
    """How a model is divided: the method of each of its mixers (by layer), and how rows are cut.

    ``notes``: what was chosen where the configuration left it open, a sentence each.
    """

    methods: tuple[ContextParallel | None, ...]
    head_tail: bool
    notes: tuple[str, ...]


def decide_division(model: Model, config: ParallelismConfig, degrees: Degrees, *, seq_len: int | None, device_type: str) -> Division:
    """How ``model``, on the meta device or not, is divided; one ConfigError with every reason why it cannot be.

    ``seq_len``: tokens of a training row; None where rows of any length are only evaluated, which are padded.
    """
    problems = [*_refusals(model, config, degrees), *_tensor_problems(model, config, degrees, device_type)]
    methods, notes = [], []
    for mixer in _mixers(model):
        method, reasons = _method(mixer, config, degrees)
        if degrees.cp > 1 and method is None:
            name = f"{type(mixer).__qualname__} cannot be divided among {degrees.cp} processes: {'; '.join(reasons)}"
            problems.append(Problem(f"{name}; use another degree or mixer", _context_key(config, degrees)))
        elif reasons:
            notes.append(f"{type(mixer).__qualname__}: context parallelism by {method.value if method else '-'}, as {'; '.join(reasons)}")
        methods.append(method)
    head_tail, wanted = False, config.context_parallel_load_balance
    used = {method for method in methods if method is not None}
    if degrees.cp > 1 and used:
        try:
            head_tail = uses_head_tail(used, wanted)
        except ValueError as error:
            problems.append(Problem(f"head_tail: {error}; use 'auto'", "parallelism.context_parallel_load_balance"))
    too_short = _length_problems(config, degrees, seq_len, head_tail=head_tail)
    if too_short and head_tail and wanted == "auto" and not _length_problems(config, degrees, seq_len, head_tail=False):
        notes.append(f"rows are divided contiguously: {seq_len} tokens do not make two equal parts for each process")
        head_tail, too_short = False, []
    problems += too_short
    if problems:
        raise ConfigError(*_unique(problems))
    return Division(tuple(methods), head_tail, tuple(dict.fromkeys(notes)))


def technique_problems(
    model: Model,
    *,
    activation_checkpoint: ActivationCheckpointConfig,
    compile_config: CompileConfig,
    float8: Float8Config,
    parallelism: ParallelismConfig,
    degrees: Degrees,
    seq_len: int,
    device_type: str,
) -> list[Problem]:
    """Why activation checkpointing, compile or float8 cannot be applied to ``model``, bare and on the meta device."""
    mode, problems = activation_checkpoint.mode, []
    if parallelism.enable_async_tensor_parallel and not compile_config.enable:
        message = "it is the compiler that overlaps; set compile.enable to true, or this to false"
        problems.append(Problem(message, "parallelism.enable_async_tensor_parallel"))
    if mode == "memory_budget" and not compile_config.enable:
        problems.append(Problem("it is the compiler that keeps to a budget; set compile.enable to true", "activation_checkpoint.mode"))
    every, n_blocks = activation_checkpoint.selective_ac_option, sum(1 for _ in model.blocks())
    if mode == "selective" and every != "op" and every > n_blocks:
        message = f"{every}: of {n_blocks} blocks no {every}-th one is recomputed; use 'op', or 1 to {n_blocks}"
        problems.append(Problem(message, "activation_checkpoint.selective_ac_option"))
    if mode in ("full", "selective") and "recomputation" in model.refuses:
        message = f"{type(model).__qualname__} cannot be recomputed: {model.refuses['recomputation']}; use 'none'"
        problems.append(Problem(message, "activation_checkpoint.mode"))
    if float8.enable and "float8" in model.refuses:
        message = f"{type(model).__qualname__} cannot use it: {model.refuses['float8']}; use false"
        return [*problems, Problem(message, "quantize.linear.float8.enable")]
    return [*problems, *float8_problems(model, float8, degrees, seq_len=seq_len, device_type=device_type)]


def _refusals(model: Model, config: ParallelismConfig, degrees: Degrees) -> Iterator[Problem]:
    """What the model itself cannot bear."""
    name = type(model).__qualname__
    if degrees.cp > 1 and "context_parallel" in model.refuses:
        yield Problem(f"{name} cannot be divided: {model.refuses['context_parallel']}; use 1", "parallelism.context_parallel_degree")
    if degrees.tp > 1 and "tensor_parallel" in model.refuses:
        yield Problem(f"{name} cannot be divided: {model.refuses['tensor_parallel']}; use 1", "parallelism.tensor_parallel_degree")
    if degrees.tp > 1 and config.enable_sequence_parallel and "sequence_parallel" in model.refuses:
        yield Problem(f"{name} cannot be divided: {model.refuses['sequence_parallel']}; use false", "parallelism.enable_sequence_parallel")


def _mixers(model: Model) -> list[BaseMixer]:
    """In the order of the blocks."""
    return [module for module in model.modules() if isinstance(module, BaseMixer)]


def _method(mixer: BaseMixer, config: ParallelismConfig, degrees: Degrees) -> tuple[ContextParallel | None, list[str]]:
    if degrees.cp == 1:
        return None, []
    if not isinstance(mixer, SequenceMixer):
        return None, ["it is a LocalMixer, which declares nothing"]
    return choose_method(mixer, config.context_parallel_method, degree=degrees.cp, n_shares=degrees.tp)


def _context_key(config: ParallelismConfig, degrees: Degrees) -> str:
    return f"parallelism.context_parallel_{'degree' if config.context_parallel_method == 'auto' else 'method'}"


def _tensor_problems(model: Model, config: ParallelismConfig, degrees: Degrees, device_type: str) -> Iterator[Problem]:
    if config.enable_async_tensor_parallel and device_type != "cuda":
        yield Problem(f"is for CUDA, and this is {device_type}; set it to false", "parallelism.enable_async_tensor_parallel")
    if config.enable_async_tensor_parallel and degrees.tp == 1:
        yield Problem("needs tensor_parallel_degree above 1", "parallelism.enable_async_tensor_parallel")
    if degrees.tp == 1:
        return
    key = "parallelism.tensor_parallel_degree"
    for module in model.modules():
        reason = why_not_divided(module, degrees.tp)
        if reason:
            yield Problem(f"{type(module).__qualname__} cannot be divided among {degrees.tp} processes: {reason}", key)


def why_not_divided(module: nn.Module, degree: int) -> str:
    """Why tensor parallelism cannot divide a component; empty where it can."""
    if isinstance(module, LocalMixer):
        return "it is a LocalMixer, which declares nothing"
    if isinstance(module, SequenceMixer):
        n_heads = max(stream.n_heads for stream in module.declared_streams.values())
        if n_heads % degree:
            return f"{n_heads} heads are no multiple of it"
    if isinstance(module, ChannelMixer):
        columns = {split.heads for split in module.tensor_parallel.values() if split.kind == "column"}
        for field in sorted(columns):
            n_units = getattr(module.config, field)
            if n_units % degree:
                return f"{n_units} hidden units ({field}) are no multiple of it"
            for part in module.modules():
                if isinstance(part, Activation) and n_units > 0 and (part.unit_group is None or n_units // degree % part.unit_group):
                    group = "all units" if part.unit_group is None else f"groups of {part.unit_group} units"
                    return f"{type(part).__qualname__} reads {group} together, and a process has {n_units // degree} of {n_units}"
    if isinstance(module, LinearLayer):
        return module.why_not_divided
    if isinstance(module, HeadNorm) and module.n_groups > 1 and module.n_groups % degree:
        return f"its {module.n_groups} groups are neither 1 nor a multiple of it"
    return ""


def _length_problems(config: ParallelismConfig, degrees: Degrees, seq_len: int | None, *, head_tail: bool) -> list[Problem]:
    sequence_parallel = degrees.tp if config.enable_sequence_parallel else 1
    multiple = degrees.cp * (2 if head_tail else 1) * sequence_parallel
    if seq_len is None or seq_len % multiple == 0:
        return []
    parts = f"{multiple} = context_parallel_degree {degrees.cp}{' x 2 (head_tail)' if head_tail else ''}"
    parts += f" x tensor_parallel_degree {sequence_parallel}" if sequence_parallel > 1 else ""
    return [Problem(f"{seq_len} tokens are no multiple of {parts}; use one that is", "training.seq_len")]


def _unique(problems: list[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))
