"""From a configuration to the parts of a run: model, loader, optimizers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from titanarch.checkpoint.config import CheckpointConfig
from titanarch.checkpoint.store import load
from titanarch.checkpoint.train_state import ModelState
from titanarch.config.errors import ConfigError, Problem
from titanarch.config.load import load_config
from titanarch.contract.cost import Cost
from titanarch.contract.growth import Growth
from titanarch.contract.init import InitConfig, qualified_names
from titanarch.contract.mixer import BaseMixer
from titanarch.contract.model import MODELS, Model
from titanarch.contract.roles import Role, roles_of
from titanarch.data.tokenizers import Tokenizer, build_tokenizer
from titanarch.parallel.apply import materialize, parallelize
from titanarch.parallel.check import Division, decide_division
from titanarch.parallel.config import ParallelismConfig
from titanarch.parallel.float8 import float8_notes
from titanarch.parallel.mesh import Mesh, build_mesh, resolve_degrees
from titanarch.train.check import kernel_problems, meta_model, vocabulary
from titanarch.train.parametrization import widen
from titanarch.train.processes import Processes
from titanarch.train.resolve import DTYPES, param_dtype
from titanarch.train.run_config import RunConfig


@dataclass(frozen=True)
class LaidOut:
    """A model divided over processes, on the meta device; ``names``, ``roles``, ``growth`` and ``cost`` are those of the bare model.

    ``division``: how. ``growth``: of each parameter against the base model of mup; None without one. ``notes``: what was decided where
    the configuration left it open.
    """

    model: Model
    mesh: Mesh
    division: Division
    names: dict[nn.Module, str]
    roles: dict[str, Role]
    cost: Cost
    notes: tuple[str, ...]
    growth: Mapping[str, Growth] | None = None


def lay_out(config: RunConfig, vocab_size: int, *, world_size: int, device_type: str, trains: bool = True) -> LaidOut:
    """The model of a resolved ``config``, divided over ``world_size`` processes as it says.

    ``trains``: False where it only evaluates, for which the run's seq_len need not divide.
    """
    model, training = meta_model(config, vocab_size), config.training
    names, roles, growth = qualified_names(model), roles_of(model), widen(model, config, vocab_size)
    cost = MODELS.of(config.model).cost(config.model, vocab_size, training.seq_len)
    counted = sum(p.numel() for p in model.parameters())
    assert cost.parameters == counted, f"cost of {type(model).__qualname__} says {cost.parameters} parameters, the model has {counted}"
    degrees = resolve_degrees(config.parallelism, world_size)
    seq_len = training.seq_len if trains else None
    division = decide_division(model, config.parallelism, degrees, seq_len=seq_len, device_type=device_type)
    mesh = build_mesh(degrees, device_type)
    parallelize(
        model,
        mesh,
        division,
        vocab_size=vocab_size,
        parallelism=config.parallelism,
        activation_checkpoint=config.activation_checkpoint,
        compile_config=config.compile,
        float8=config.quantize.linear.float8,
        param_dtype=param_dtype(config),
        reduce_dtype=DTYPES[training.mixed_precision_reduce],
    )
    notes = division.notes + float8_notes(config.quantize.linear.float8, device_type)
    return LaidOut(model, mesh, division, names, roles, cost, notes, growth)


def kernel_notes(model: Model, device_type: str, *, compiled: bool) -> tuple[str, ...]:
    """Whose kernels the mixers of ``model`` chose, a sentence for each kind."""
    mixers = (m for m in model.modules() if isinstance(m, BaseMixer))
    notes = (f"{type(m).__qualname__}: {said}" for m in mixers if (said := m.note_on(device_type, compiled=compiled)))
    return tuple(dict.fromkeys(notes))


def build_model(config: RunConfig, processes: Processes, vocab_size: int, *, trains: bool = True) -> LaidOut:
    """Meta, then parallel, then weights by the seed. ``config`` is resolved; ``trains``: see ``lay_out``."""
    laid_out = lay_out(config, vocab_size, world_size=processes.world_size, device_type=processes.device.type, trains=trains)
    assert config.debug.seed is not None, "the configuration is resolved before anything is built"
    init = getattr(config.model, "init", InitConfig())
    device = torch.device("cpu") if config.parallelism.enable_cpu_offload else processes.device
    materialize(laid_out.model, laid_out.names, init, seed=config.debug.seed, device=device, growth=laid_out.growth)
    compiled = config.compile.enable and trains
    return replace(laid_out, notes=laid_out.notes + kernel_notes(laid_out.model, processes.device.type, compiled=compiled))


@dataclass(frozen=True)
class OpenRun:
    """A trained model from its run's folder, for what reads runs: evaluation, generation."""

    config: RunConfig
    model: Model
    mesh: Mesh
    tokenizer: Tokenizer
    step: int


def open_run(folder: Path, processes: Processes, *, step: int = -1, parallelism: ParallelismConfig | None = None) -> OpenRun:
    """The model of the run in ``folder`` at its newest checkpoint, or at ``step``, laid out over ``processes``.

    ``parallelism``: how; by default each process has rows of its own.

    Raises ConfigError where the folder holds no run, or no sound checkpoint, ``parallelism`` does not fit, or a kernel that the run asks
    for by name cannot run here.
    """
    if not (folder / "config.toml").is_file():
        raise ConfigError(Problem(f"{folder} holds no config.toml, so it is no run; give the dump_folder of a run"))
    config = load_config(folder / "config.toml", (), RunConfig).config
    # The layout of the run that trained it need not fit the processes at hand.
    config = config.model_copy(update={"parallelism": parallelism or ParallelismConfig()})
    tokenizer = build_tokenizer(config.data.tokenizer)
    vocab_size = vocabulary(config, tokenizer.vocab_size)
    problems = kernel_problems(meta_model(config, vocab_size), processes.device.type, compiled=False)
    if problems:
        raise ConfigError(*problems)
    built = build_model(config, processes, vocab_size, trains=False)
    state, how = {"model": ModelState(built.model)}, config.checkpoint.verify
    loaded = load(checkpoint_location(folder, config.checkpoint), state, step=step, how=how)
    if loaded is None:
        raise ConfigError(Problem(f"{folder} has no committed checkpoint; train with checkpoint.enable = true"))
    built.model.eval()
    return OpenRun(config, built.model, built.mesh, tokenizer, loaded.step)


def checkpoint_location(folder: Path, config: CheckpointConfig) -> str:
    """Where the checkpoints of the run in ``folder`` lie."""
    return config.folder if "://" in config.folder else str(folder / config.folder)
