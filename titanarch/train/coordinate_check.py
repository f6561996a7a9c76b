"""The coordinate check of muP (arXiv:2203.03466, appendix D): how far activations move in a few steps, by width.

Each width trains the same few steps on the same rows. What moves as much at every width keeps its learning rate; what moves the more
the wider the model is needs a smaller one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from titanarch.config.errors import ConfigError, Problem
from titanarch.contract.channel import ChannelMixer
from titanarch.contract.mixer import BaseMixer
from titanarch.contract.model import ModelConfig
from titanarch.data.batch import Batch
from titanarch.data.loader import build_loader
from titanarch.data.tokenizers import build_tokenizer
from titanarch.evaluate.sequence import sequence_of
from titanarch.train.check import vocabulary
from titanarch.train.gradients import GradientClipper, LossScaler
from titanarch.train.guard import GradientGuard
from titanarch.train.optimizers import build_optimizers
from titanarch.train.parametrization import base_config
from titanarch.train.processes import Processes
from titanarch.train.run_config import RunConfig
from titanarch.train.setup import LaidOut, build_model
from titanarch.train.step import TrainStep

LOGITS = "logits"
IN_PROPORTION = ("d_model", "n_heads", "n_kv_heads", "n_key_heads", "d_ff", "value_units")
"""Keys of [model], wherever in it they stand, that grow with the width."""


@dataclass
class Moved:
    """By activation and width: root mean square of what it is after the steps less what it was before them."""

    widths: tuple[int, ...]
    by_name: dict[str, list[float]] = field(default_factory=dict)

    def exponent(self, name: str) -> float:
        """Of the width: the slope of log(moved) on log(width); 0 is what muP promises."""
        x = [math.log(width) for width in self.widths]
        y = [math.log(max(value, 1e-30)) for value in self.by_name[name]]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def coordinate_check(config: RunConfig, processes: Processes, *, widths: Sequence[int], steps: int) -> Moved:
    """Train ``config``, resolved, for ``steps`` at each of ``widths`` and compare; at its lr from the first step on.

    Raises ConfigError where a width cannot be made of the model.
    """
    moved = Moved(tuple(sorted(widths)))
    configs = [config.model_copy(update={"model": at_width(config.model, width)}) for width in moved.widths]
    for at_its_width in configs:
        for name, value in _moved(at_its_width, processes, steps).items():
            moved.by_name.setdefault(name, []).append(value)
    return moved


def at_width(model: ModelConfig, width: int) -> ModelConfig:
    """The model with d_model = ``width``, heads of the same size, and all other widths, heads and hidden units in proportion."""
    table = model.model_dump()
    d_model, n_heads = table.get("d_model"), table.get("n_heads")
    if not isinstance(d_model, int) or not isinstance(n_heads, int):
        raise ConfigError(Problem(f"the model '{model.kind}' has no d_model and n_heads to change the width by", "model.name"))
    return base_config(model, _grown(table, "model", width, d_model))


def _grown(value: Any, name: str, width: int, d_model: int) -> Any:
    """A part ``name`` of the [model] table with what is as wide as the model in proportion to it."""
    if isinstance(value, Mapping):
        return {key: _grown(inner, f"{name}.{key}", width, d_model) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_grown(inner, f"{name}[{number}]", width, d_model) for number, inner in enumerate(value)]
    if not isinstance(value, int) or name.rpartition(".")[2] not in IN_PROPORTION:
        return value
    if value * width % d_model:
        raise ConfigError(Problem(f"width {width} would have {value} x {width} / {d_model} as its {name}, no whole number", "--widths"))
    return value * width // d_model


def _moved(config: RunConfig, processes: Processes, steps: int) -> Mapping[str, float]:
    training, seed = config.training, config.debug.seed
    assert seed is not None, "the configuration is resolved before anything is built"
    tokenizer = build_tokenizer(config.data.tokenizer)
    built = build_model(config, processes, vocabulary(config, tokenizer.vocab_size))
    loader = build_loader(
        config.data,
        tokenizer=tokenizer,
        seq_len=training.seq_len,
        global_batch_size=training.global_batch_size,
        local_batch_size=training.global_batch_size,
        dp_rank=0,
        dp_degree=1,
        seed=seed,
    )
    try:
        batches = list(islice(loader, steps))
    finally:
        loader.close()
    step = _train_step(config, processes, built, seed)
    before = _activations(built.model, batches[0])
    for number, batch in enumerate(batches, 1):
        step(number, [batch])
    after = _activations(built.model, batches[0])
    return {name: float((after[name] - before[name]).square().mean().sqrt()) for name in before}


def _train_step(config: RunConfig, processes: Processes, built: LaidOut, seed: int) -> TrainStep:
    scaler = LossScaler(enabled=False)
    return TrainStep(
        built.model,
        build_optimizers(config.optimizer, built.model.named_parameters(), built.roles, built.growth),
        clipper=GradientClipper(built.model.parameters(), config.training.max_norm),
        scaler=scaler,
        guard=GradientGuard(config.bad_gradients, scaler),
        mesh=built.mesh,
        device=processes.device,
        seed=seed,
        z_weight=config.training.z_loss_weight,
    )


def _activations(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What every mixer and channel mixer adds to the stream, and the logits, without random draws; fp32 on the host."""
    found: dict[str, Tensor] = {}
    handles = [module.register_forward_hook(_keep(found, name)) for name, module in _watched(model)]
    try:
        with torch.no_grad():
            sequence = sequence_of(batch, seed=None)
            found[LOGITS] = model.logits(batch.tokens_BT, sequence).float().cpu()  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()
    return found


def _watched(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, BaseMixer | ChannelMixer):
            yield name, module


def _keep(found: dict[str, Tensor], name: str) -> Callable[[nn.Module, object, Any], None]:
    def hook(_module: nn.Module, _args: object, output: Any) -> None:
        found[name] = (output[0] if isinstance(output, tuple) else output).detach().float().cpu()

    return hook
