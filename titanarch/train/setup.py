"""From a configuration to the parts of a run: model, loader, optimizers."""

from dataclasses import dataclass
from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh

from titanarch.checkpoint.config import CheckpointConfig
from titanarch.checkpoint.store import load
from titanarch.checkpoint.train_state import ModelState
from titanarch.config.errors import ConfigError, Problem
from titanarch.config.load import load_config
from titanarch.contract.cost import Cost
from titanarch.contract.init import InitConfig, qualified_names
from titanarch.contract.model import MODELS, Model
from titanarch.contract.roles import Role, roles_of
from titanarch.data.tokenizers import Tokenizer, build_tokenizer
from titanarch.parallel.apply import materialize, parallelize
from titanarch.parallel.config import ParallelismConfig
from titanarch.parallel.mesh import build_mesh, resolve_degrees
from titanarch.train.check import meta_model, vocabulary
from titanarch.train.processes import Processes
from titanarch.train.resolve import DTYPES, param_dtype
from titanarch.train.run_config import RunConfig


@dataclass(frozen=True)
class BuiltModel:
    """A model laid out over processes; ``roles`` and ``cost`` are those of the bare model."""

    model: Model
    mesh: DeviceMesh
    roles: dict[str, Role]
    cost: Cost


def build_model(config: RunConfig, processes: Processes, vocab_size: int) -> BuiltModel:
    """Meta, then parallel, then weights by the seed. ``config`` is resolved."""
    bare = meta_model(config, vocab_size)
    names, roles = qualified_names(bare), roles_of(bare)
    cost = MODELS.of(config.model).cost(config.model, vocab_size, config.training.seq_len)
    counted = sum(p.numel() for p in bare.parameters())
    assert cost.parameters == counted, f"cost of {type(bare).__qualname__} says {cost.parameters} parameters, the model has {counted}"
    mesh = build_mesh(resolve_degrees(config.parallelism, processes.world_size), processes.device.type)
    parallelize(
        bare,
        mesh,
        parallelism=config.parallelism,
        activation_checkpoint=config.activation_checkpoint,
        compile_config=config.compile,
        param_dtype=param_dtype(config),
        reduce_dtype=DTYPES[config.training.mixed_precision_reduce],
    )
    assert config.debug.seed is not None, "the configuration is resolved before anything is built"
    init = getattr(config.model, "init", InitConfig())
    materialize(bare, names, init, seed=config.debug.seed, device=processes.device)
    return BuiltModel(bare, mesh, roles, cost)


@dataclass(frozen=True)
class OpenRun:
    """A trained model from its run's folder, for what reads runs: evaluation, generation."""

    config: RunConfig
    model: Model
    tokenizer: Tokenizer
    step: int


def open_run(folder: Path, processes: Processes, *, step: int = -1) -> OpenRun:
    """The model of the run in ``folder`` at its newest checkpoint, or at ``step``, laid out over ``processes``.

    Raises ConfigError where the folder holds no run, or no sound checkpoint.
    """
    if not (folder / "config.toml").is_file():
        raise ConfigError(Problem(f"{folder} holds no config.toml, so it is no run; give the dump_folder of a run"))
    config = load_config(folder / "config.toml", (), RunConfig).config
    # The layout of the run that trained it need not fit the processes at hand.
    config = config.model_copy(update={"parallelism": ParallelismConfig()})
    tokenizer = build_tokenizer(config.data.tokenizer)
    built = build_model(config, processes, vocabulary(config, tokenizer.vocab_size))
    loaded = load(checkpoint_location(folder, config.checkpoint), {"model": ModelState(built.model)}, step=step)
    if loaded is None:
        raise ConfigError(Problem(f"{folder} has no committed checkpoint; train with checkpoint.enable = true"))
    built.model.eval()
    return OpenRun(config, built.model, tokenizer, loaded.step)


def checkpoint_location(folder: Path, config: CheckpointConfig) -> str:
    """Where the checkpoints of the run in ``folder`` lie."""
    return config.folder if "://" in config.folder else str(folder / config.folder)
