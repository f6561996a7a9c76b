"""Any nn.Module as a mixer, by its import path: another package's layer, or a class in a user's file.

Shapes: B rows, T tokens, D model dim.
"""

import importlib
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from titanarch.config.errors import ConfigError, Problem
from titanarch.contract.card import Card
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.mixer import LocalMixer, MixerConfig, mixer
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape

Argument = bool | int | float | str


class ExternalConfig(MixerConfig):
    """[model.mixers.NAME] with kind = "external"."""

    module: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] = Field(description='the class, "package.module:Class"')
    arguments: dict[str, Argument] = Field({}, description='keyword arguments of the class; "$d_model" and "$layer" stand for their values')
    mix_documents: bool = Field(False, description="let documents packed into one row mix, since the class is told nothing of them")
    flops_per_token: Annotated[float, Field(ge=0)] | None = Field(
        None, description="forward FLOPs a token beyond its Linears; unset: the Linears alone, counted"
    )


@mixer("external")
class External(LocalMixer):
    """Called as ``module(x_BTD)``; where it returns a tuple, the first item is its output.

    It is told nothing of documents: rows that pack several are refused unless ``mix_documents``.
    Weights start as the module starts them, keyed by name like all others.
    """

    Config = ExternalConfig
    card = Card("any nn.Module, by its import path", "-", "the module itself")

    def __init__(self, config: ExternalConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        self.config = config
        self.accepts_packed_rows = config.mix_documents
        self.arguments = arguments_for(config, shape, layer)
        self.wrapped = build(config, self.arguments)

    @staticmethod
    def cost(config: ExternalConfig, shape: ModelShape, layer: int) -> Cost:
        with torch.device("meta"):
            module = build(config, arguments_for(config, shape, layer))
        linears = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
        return Cost(sum(p.numel() for p in module.parameters()), 2.0 * linears + (config.flops_per_token or 0.0))

    def reset_parameters(self, init: Init) -> None:
        """What the module's own constructor draws, under the CPU generator seeded by each parameter's name.

        A parameter's draw is the module built anew with that generator as torch's global one.
        """
        for prefix, module in self.wrapped.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                init.fill(module, name, partial(self._draw, f"{prefix}.{name}" if prefix else name))

    def _draw(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(generator.initial_seed())
            return build(self.config, self.arguments).get_parameter(name).detach()

    def forward(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        if seq.packed and not self.accepts_packed_rows:
            raise ConfigError(
                f"mixer '{self.config.module}' would mix the documents packed into one row; set mix_documents = true to allow it"
            )
        out = self.wrapped(x_BTD)
        y: Tensor = out[0] if isinstance(out, tuple) else out
        if y.shape != x_BTD.shape:
            raise ConfigError(f"mixer '{self.config.module}' gave {tuple(y.shape)} for {tuple(x_BTD.shape)}; it must keep the shape")
        return y


def arguments_for(config: ExternalConfig, shape: ModelShape, layer: int) -> dict[str, Argument]:
    """The keyword arguments with what stands for the model's sizes filled in."""
    known: dict[Argument, int] = {"$d_model": shape.d_model, "$layer": layer, "$n_layers": shape.n_layers, "$seq_len": shape.seq_len}
    return {name: known.get(value, value) if isinstance(value, str) else value for name, value in config.arguments.items()}


def build(config: ExternalConfig, arguments: dict[str, Argument]) -> nn.Module:
    """The module; a ConfigError where it cannot be imported or refuses its arguments."""
    path, _, name = config.module.partition(":")
    try:
        found: Any = getattr(importlib.import_module(path), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            Problem(f"cannot import '{config.module}': {error}; install the package or correct the path", "model.mixers")
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(Problem(f"'{config.module}' is no nn.Module class", "model.mixers"))
    try:
        return found(**arguments)
    except TypeError as error:
        raise ConfigError(Problem(f"'{config.module}' does not take these arguments: {error}", "model.mixers")) from error
