"""What is checked: two layers of one component, small enough for a second of work, and what they are fed.

Shapes: B rows, T tokens, D model dim.
"""

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

import titanarch.models.components  # noqa: F401 (registers all)
from titanarch.config.errors import ConfigError, did_you_mean
from titanarch.config.explain import explain
from titanarch.config.registry import ComponentConfig, Registry
from titanarch.config.section import Section
from titanarch.config.tree import Origin, grow
from titanarch.contract.channel import CHANNELS, ChannelConfig, ChannelMixer
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init, InitConfig, name_keyed_generator, qualified_names
from titanarch.contract.mixer import MIXERS, BaseMixer, MixerConfig
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.models.flavors import complete

Component = BaseMixer | ChannelMixer
Slot = Literal["mixer", "channel"]

N_ROWS, N_TOKENS, D_MODEL, N_HEADS, N_LAYERS, VOCAB_SIZE = 2, 32, 32, 4, 2, 64
STD, LIVELINESS = 0.2, 0.1
"""Standard deviations of initial weights, and of what is added to every parameter, so that none is zero or one."""


class _Tables(Section):
    """The part of a configuration that names components."""

    mixers: dict[str, Annotated[MixerConfig, MIXERS]] = Field({}, description="mixers by name")
    channel: Annotated[ChannelConfig, CHANNELS] = Field(default_factory=lambda: CHANNELS.resolve("none"), description="the channel mixer")


@dataclass(frozen=True)
class Subject:
    """A component by its ``slot`` and registered name, ``kind``.

    ``table``: its keys in a TOML, beside what it takes from [model]. ``imports``: modules that register it.
    """

    slot: Slot
    kind: str
    table: Mapping[str, Any] = field(default_factory=dict)
    imports: Sequence[str] = ()

    @property
    def name(self) -> str:
        return f"{self.slot} {self.kind}"

    @property
    def component(self) -> type[Component]:
        """Its class; a ConfigError where none is registered or a module cannot be imported."""
        for module in self.imports:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ConfigError(f"cannot import '{module}': {error}; install it, or put its folder on PYTHONPATH") from error
        registry: Registry[Any] = MIXERS if self.slot == "mixer" else CHANNELS
        if self.kind not in registry:
            raise ConfigError(f"unknown {registry.slot} '{self.kind}'{did_you_mean(self.kind, registry)}; --import names what registers it")
        if self.name == "channel none":
            raise ConfigError("the channel mixer 'none' stands for nothing at all, so there is nothing to check; name another")
        found: type[Component] = registry[self.kind]
        return found

    @property
    def shape(self) -> ModelShape:
        return ModelShape(d_model=D_MODEL, vocab_size=VOCAB_SIZE, seq_len=N_TOKENS, layers=(self.kind,) * N_LAYERS)

    @property
    def config(self) -> ComponentConfig:
        """Its Config, completed from [model] as in a run; a ConfigError where the table is wrong."""
        _ = self.component  # which raises where it is unknown
        if self.slot == "mixer":
            model = {"n_heads": N_HEADS, "position": {"relative": "rotary"}, "layers": [self.kind], "mixers": {self.kind: dict(self.table)}}
            table = {"mixers": complete(model)["mixers"]}
        else:
            table = {"channel": {"kind": self.kind, **self.table}}
        try:
            tables = _Tables.model_validate(table)
        except ValidationError as error:
            raise ConfigError(*explain(error, _Tables, grow(table, lambda _: Origin(f"table of {self.name}", None)))) from error
        return tables.mixers[self.kind] if self.slot == "mixer" else tables.channel


class Layer(nn.Module):
    """x + component(x)."""

    def __init__(self, component: Component) -> None:
        super().__init__()
        self.component = component

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Tensor, Carry]:
        out, carry = self.component.run(x_BTD, seq, carry)
        return x_BTD + out, carry


class Stack(nn.Module):
    """The layers one after the other; later ones may read what the first one left in the carry. Raises what the component raises."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        config, shape = subject.config, subject.shape
        self.layers = nn.ModuleList(Layer(subject.component(config, shape, layer)) for layer in range(N_LAYERS))

    def components(self) -> Iterator[Component]:
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer.component

    def forward(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        carry = Carry.empty()
        for layer in self.layers:
            x_BTD, carry = layer(x_BTD, seq, carry)
        return x_BTD


def cost_of(subject: Subject, layer: int) -> Cost:
    """What the component says that it costs in block ``layer``."""
    component, config = subject.component, subject.config
    if issubclass(component, BaseMixer):
        return component.cost(config, subject.shape, layer)
    return component.cost(config, subject.shape)


def initialized(subject: Subject, *, seed: int = 1, std: float = STD) -> tuple[Stack, set[str]]:
    """The layers as a run makes them, fp32: on the meta device, then memory full of NaN, then ``reset_parameters``.

    With the names of the parameters that it filled.
    """
    with torch.device("meta"):
        stack = Stack(subject)
    stack.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*stack.parameters(), *stack.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
    init = Init(InitConfig(std=std), names=qualified_names(stack), seed=seed, n_layers=N_LAYERS)
    for component in stack.components():
        component.reset_parameters(init)
    return stack, init.filled


def built(subject: Subject, dtype: torch.dtype = torch.float64) -> Stack:
    """The layers with weights that depend on the names alone, alike in every process, none of them at a neutral value."""
    stack, _ = initialized(subject)
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=name_keyed_generator(2, name)), alpha=LIVELINESS)
    return stack.to(dtype)


def inputs(n_tokens: int = N_TOKENS) -> tuple[Tensor, Tensor]:
    """What the layers read, and the weights of their outputs in a loss; [B, T, D] in fp64."""
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(N_ROWS, n_tokens, D_MODEL, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, weights


DOCUMENTS = ((5, 1, 26), (16, 16))
"""Tokens of each row's documents: one begins inside a part of two processes, one with a part, one is a single token."""


def rows(stack: Stack) -> SequenceInfo:
    """Packed rows, or one document a row where the component refuses those."""
    if not all(component.accepts_packed_rows for component in stack.components() if isinstance(component, BaseMixer)):
        return SequenceInfo.whole(N_ROWS, N_TOKENS, seed=0, first_row=3)
    return SequenceInfo.of_lengths(DOCUMENTS, seed=0, first_row=3)


def outcome(stack: nn.Module, x_BTD: Tensor, seq: SequenceInfo, weights_BTD: Tensor) -> dict[str, Tensor]:
    """Output and the gradients of input and parameters, for the loss sum(output * weights).

    A parameter without a gradient is left out.
    """
    x_BTD = x_BTD.clone().requires_grad_()
    y_BTD = stack(x_BTD, seq)
    (y_BTD * weights_BTD).sum().backward()
    gradients = {name: p.grad for name, p in stack.named_parameters() if p.grad is not None}
    assert x_BTD.grad is not None, "the residual stream has a gradient"
    return {"output": y_BTD.detach(), "gradient of the input": x_BTD.grad, **gradients}
