"""Initial weights keyed by name: the same seed gives the same weights on any mesh, and adding a module shifts no other.

Each parameter is drawn on the CPU, in fp32, on its global shape, from a generator seeded by the run's seed and the
parameter's qualified name, then cut to what this process holds.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from titanarch.config.section import Section
from titanarch.contract.growth import Growth

Draw = Callable[[torch.Size, torch.Generator], Tensor]
Scheme = Literal["gpt2", "pytorch", "depth_scaled", "fan_in"]

BY_FAN_IN = ("pytorch", "fan_in")
"""Schemes whose draws are as wide as 1 / sqrt(fan-in) by themselves, and alike at every depth."""


class InitConfig(Section):
    """[model.init]: how weights start."""

    scheme: Scheme = Field(
        "gpt2",
        description="gpt2: N(0, std), residual outputs over sqrt(2 n_layers); pytorch: U(+-1/sqrt(fan_in)), embedding N(0, 1); "
        "depth_scaled: N(0, std), residual outputs of block l over sqrt(2 (l + 1)); fan_in: N(0, 1/fan_in), embedding N(0, 1), as in T5",
    )
    std: Annotated[float, Field(gt=0)] = Field(0.02, description="standard deviation of normal draws; unused by pytorch and fan_in")


def qualified_names(model: nn.Module) -> dict[nn.Module, str]:
    """Each module's name in the bare model; take it before wrappers rename anything."""
    return {module: name for name, module in model.named_modules()}


class Init:
    """Fills parameters. ``reset_parameters(init)`` of a component calls it for every parameter it owns.

    names: from ``qualified_names`` of the bare model. seed: the run's. n_layers: blocks in the model. growth: of parameters by name
    against a base model (see contract.width); ``linear`` and ``residual_output`` heed it, other draws are their component's own.
    """

    def __init__(
        self, config: InitConfig, *, names: Mapping[nn.Module, str], seed: int, n_layers: int, growth: Mapping[str, Growth] | None = None
    ) -> None:
        self.config = config
        self.n_layers = n_layers
        self._growth = growth or {}
        self._names = names
        self._seed = seed
        self.filled: set[str] = set()

    def with_depth(self, n_layers: int) -> "Init":
        """The same for a part of the model whose residual stream is written by so many blocks."""
        init = copy.copy(self)
        init.n_layers = n_layers
        return init

    def linear(self, module: nn.Linear) -> None:
        """A linear layer's weight and bias by the scheme."""
        fan_in, factor = module.in_features, self.width_factor(module, "weight")
        if self.config.scheme == "pytorch":
            self.uniform(module, "weight", factor / math.sqrt(fan_in))
        elif self.config.scheme == "fan_in":
            self.normal(module, "weight", factor / math.sqrt(fan_in))
        else:
            self.normal(module, "weight", self.config.std * factor)
        self._bias(module, fan_in)

    def residual_output(self, module: nn.Linear, layer: int) -> None:
        """A linear layer that writes to the residual stream, in block ``layer``."""
        if self.config.scheme in BY_FAN_IN:
            return self.linear(module)
        depth = self.n_layers if self.config.scheme == "gpt2" else layer + 1
        self.normal(module, "weight", self.config.std * self.width_factor(module, "weight") / math.sqrt(2 * depth))
        return self._bias(module, module.in_features)

    def matrices(self, module: nn.Module, name: str, *, residual_of: int | None = None) -> None:
        """Parameter ``name``, [..., d_out, d_in], as linear layers' weights; ``residual_of``: they write to the stream in that block."""
        factor = self.width_factor(module, name)
        if self.config.scheme == "pytorch":
            return self.uniform(module, name, factor / math.sqrt(module.get_parameter(name).shape[-1]))
        if self.config.scheme == "fan_in":
            return self.normal(module, name, factor / math.sqrt(module.get_parameter(name).shape[-1]))
        return self.normal(module, name, self.config.std * factor * (1.0 if residual_of is None else self.residual_factor(residual_of)))

    def residual_factor(self, layer: int) -> float:
        """What the scheme multiplies the spread of residual outputs of block ``layer`` by."""
        if self.config.scheme in BY_FAN_IN:
            return 1.0
        return 1 / math.sqrt(2 * (self.n_layers if self.config.scheme == "gpt2" else layer + 1))

    def embedding(self, module: nn.Embedding) -> None:
        """A table of vectors by the scheme: N(0, 1) for pytorch and fan_in, else N(0, std)."""
        self.normal(module, "weight", 1.0 if self.config.scheme in BY_FAN_IN else self.config.std)

    def normal(self, module: nn.Module, name: str, std: float, *, mean: float = 0.0) -> None:
        self.fill(module, name, lambda shape, g: torch.randn(shape, generator=g, dtype=torch.float32) * std + mean)

    def uniform(self, module: nn.Module, name: str, bound: float, *, center: float = 0.0) -> None:
        self.fill(module, name, lambda shape, g: (torch.rand(shape, generator=g, dtype=torch.float32) * 2 - 1) * bound + center)

    def constant(self, module: nn.Module, name: str, value: float) -> None:
        self.fill(module, name, lambda shape, _: torch.full(shape, value))

    def fill(self, module: nn.Module, name: str, draw: Draw) -> None:
        """Set parameter ``name`` of ``module`` to ``draw(global shape, generator)``."""
        qualified = self._qualified(module, name)
        parameter = module.get_parameter(name)
        value = draw(parameter.shape, name_keyed_generator(self._seed, qualified))
        _assign(parameter, value)
        self.filled.add(qualified)

    def width_factor(self, module: nn.Module, name: str) -> float:
        """Of the scheme's spread for parameter ``name`` at this width; those in ``BY_FAN_IN`` divide by sqrt(fan-in) by themselves."""
        growth = self._growth.get(self._qualified(module, name), Growth())
        return growth.std_factor * (math.sqrt(growth.fan_in) if self.config.scheme in BY_FAN_IN else 1.0)

    def _qualified(self, module: nn.Module, name: str) -> str:
        prefix = self._names[module]
        return f"{prefix}.{name}" if prefix else name

    def _bias(self, module: nn.Linear, fan_in: int) -> None:
        if module.bias is None:
            return
        if self.config.scheme == "pytorch":
            self.uniform(module, "bias", 1 / math.sqrt(fan_in))
        else:
            self.constant(module, "bias", 0.0)


def name_keyed_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@torch.no_grad()
def _assign(parameter: Tensor, value: Tensor) -> None:
    value = value.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        whole = value.to(parameter.device)
        # Every process draws the same value, so no process has to send it: src_data_rank=None cuts locally.
        shard = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(shard.to_local())
    else:
        parameter.copy_(value)
