"""Mixers that each break the contract in one way, for the tests of what finds it. Not a test by itself."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.layers import Linear
from titanarch.contract.mixer import MixResult, Streams, Transition, mixer
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import Split
from titanarch.testing.skeletons.moving_average import MovingAverage, MovingAverageConfig


def broken(name: str) -> Any:
    """Registers a subclass of the moving average with a Config of its own."""

    def add(cls: type[MovingAverage]) -> type[MovingAverage]:
        cls.Config = type(f"{cls.__name__}Config", (MovingAverageConfig,), {"__module__": __name__, "__doc__": "As the moving average."})
        return mixer(f"broken_{name}")(cls)

    return add


@broken("undeclared")
class Undeclared(MovingAverage):
    tensor_parallel = {name: split for name, split in MovingAverage.tensor_parallel.items() if name != "wg"}


@broken("misnamed")
class Misnamed(MovingAverage):
    float8 = frozenset({"wx"})


@broken("forgetful")
class Forgetful(MovingAverage):
    def reset_parameters(self, init: Init) -> None:
        init.linear(self.wv)
        init.linear(self.wg)
        init.residual_output(self.wo, self.layer)


@broken("unseeded")
class Unseeded(MovingAverage):
    def reset_parameters(self, init: Init) -> None:
        super().reset_parameters(init)
        init.fill(self.wv, "weight", lambda shape, _: torch.randn(shape))


@broken("miscounted")
class Miscounted(MovingAverage):
    @staticmethod
    def cost(config: MovingAverageConfig, shape: ModelShape, layer: int) -> Cost:
        return MovingAverage.cost(config, shape, layer) + Cost(parameters=1)


@broken("cheap")
class Cheap(MovingAverage):
    @staticmethod
    def cost(config: MovingAverageConfig, shape: ModelShape, layer: int) -> Cost:
        return MovingAverage.cost(config, shape, layer) + Cost(forward_flops_per_token=-2.0 * shape.d_model**2)


@broken("prophet")
class Prophet(MovingAverage):
    def project(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        return super().project(x_BTD + 1e-6 * x_BTD.roll(-1, 1), seq, carry)


def shuffled(seq: MixSequence) -> MixSequence:
    """As if every row were one document."""
    query = replace(seq.query, position_BT=seq.query.index_T.expand_as(seq.query.position_BT))
    return replace(seq, query=query, key=query)


@broken("gossip")
class Gossip(MovingAverage):
    @staticmethod
    def mix(config: Any, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: Any = None) -> MixResult:
        return MovingAverage.mix(config, streams, head_params, shuffled(seq), state)


@broken("idle")
class Idle(MovingAverage):
    tensor_parallel = {**MovingAverage.tensor_parallel, "idle": Split.COLUMN}

    def __init__(self, config: MovingAverageConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        self.idle = Linear(shape.d_model, shape.d_model, bias=False)

    def reset_parameters(self, init: Init) -> None:
        super().reset_parameters(init)
        init.linear(self.idle)


@broken("moody")
class Moody(MovingAverage):
    def merge(self, y_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        return super().merge(y_BTHV, x_BTD) * torch.rand(1, dtype=x_BTD.dtype)


@broken("wide")
class Wide(MovingAverage):
    def merge(self, y_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        out = super().merge(y_BTHV, x_BTD)
        return out.to(torch.promote_types(out.dtype, torch.float32))


@broken("counting")
class Counting(MovingAverage):
    @staticmethod
    def mix(config: Any, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: Any = None) -> MixResult:
        result = MovingAverage.mix(config, streams, head_params, seq, state)
        return result._replace(y_BTHV=result.y_BTHV * (result.y_BTHV.shape[2] / config.n_heads))


@broken("amnesic")
class Amnesic(MovingAverage):
    @staticmethod
    def mix(config: Any, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: Any = None) -> MixResult:
        return MovingAverage.mix(config, streams, head_params, seq)


@broken("undecaying")
class Undecaying(MovingAverage):
    @staticmethod
    def transition(config: Any, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> Transition:
        found = MovingAverage.transition(config, streams, head_params, seq)
        return Transition(torch.ones_like(found.decay), found.state)


@broken("halving")
class Halving(MovingAverage):
    @staticmethod
    def transition(config: Any, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> Transition:
        found = MovingAverage.transition(config, streams, head_params, seq)
        return Transition(found.decay, found.state / 2)


@broken("unsummed")
class Unsummed(MovingAverage):
    """``turn`` works on the local heads alone, so its gradient is a part of a sum: SHARED would be right."""

    tensor_parallel = {**MovingAverage.tensor_parallel, "turn": Split.REPLICATED}

    def __init__(self, config: MovingAverageConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        self.turn = Linear(shape.d_model // config.n_heads, shape.d_model // config.n_heads, bias=False)

    def reset_parameters(self, init: Init) -> None:
        super().reset_parameters(init)
        init.linear(self.turn)

    def project(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        streams, carry = super().project(x_BTD, seq, carry)
        return {"v": self.turn(streams["v"])}, carry


@broken("crashing")
class Crashing(MovingAverage):
    def merge(self, y_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        raise RuntimeError("the cause")
