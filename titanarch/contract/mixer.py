"""Sequence mixers: what moves information along the sequence.

A ``config`` argument is Any in the interfaces, because each component annotates its own Config.

Shapes: B rows, T tokens, D model dim, H query heads, V value dim a head.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from titanarch.config.registry import ComponentConfig, Registry
from titanarch.contract.card import Card
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.layers import HeadParams
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import ContextParallel, Split, Stream

Streams = Mapping[str, Tensor]
"""[B, T, heads, ...] by the name declared in ``SequenceMixer.streams``."""

State = dict[str, Tensor]
"""What a mixer carries along the sequence, by name: a KV cache, a recurrent state, convolution taps."""


class MixResult(NamedTuple):
    """``y_BTHV``: the mixed values. ``lse_BTH``: log-sum-exp of the logits where RING must merge, else None.
    ``state``: after the last token, where one was given or asked for, else None."""

    y_BTHV: Tensor
    lse_BTH: Tensor | None = None
    state: State | None = None


class Transition(NamedTuple):
    """What a shard does to the state: out = decay . in + state, with ``state`` what it leaves from the zero state.

    ``decay`` broadcasts against ``state`` (scalar and vector decays) unless the mixer overrides ``compose``.
    """

    decay: Tensor
    state: Tensor


class MixerConfig(ComponentConfig):
    """The table of one mixer, [model.mixers.NAME]."""

    def check_sizes(self, d_model: int) -> None:
        """A ValueError where the sizes do not fit a model of this width."""

    def check_first(self, first: "MixerConfig", d_model: int) -> None:
        """A ValueError where a block of this mixer needs another one than ``first`` in block 0."""


class Mix(Protocol):
    """The mix step as parallel/ may wrap it."""

    def __call__(self, mixer: "SequenceMixer", streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> MixResult: ...


def mix_whole(mixer: "SequenceMixer", streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> MixResult:
    """The mix step on one process: every row and every head is here."""
    return mixer.mix(mixer.config, streams, head_params, seq)


class BaseMixer(nn.Module, ABC):
    """What a block calls. ``SequenceMixer`` and ``LocalMixer`` are the two ways to write one."""

    Config: ClassVar[type[MixerConfig]]
    card: ClassVar[Card | None] = None
    accepts_packed_rows: bool = True
    """Whether documents packed into one row may reach it: they stay apart, or the user lets them mix."""

    @staticmethod
    @abstractmethod
    def cost(config: Any, shape: ModelShape, layer: int) -> Cost:
        """Parameters, forward FLOPs a token at ``shape.seq_len``, state bytes of block ``layer``'s mixer."""

    @abstractmethod
    def reset_parameters(self, init: Init) -> None:
        """Fill every parameter through ``init``; the docstring lists each initializer."""

    @abstractmethod
    def run(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Tensor, Carry]:
        """What is added to the residual stream, [B, T, D], and the carry for later blocks."""

    def why_not_on(self, device_type: str, *, compiled: bool) -> str:
        """Why it cannot run on devices of this type as its table asks, and what to do; empty where it can.

        ``compiled``: whether torch.compile traces it. Override where a kernel is asked for by name.
        """
        return ""

    def note_on(self, device_type: str, *, compiled: bool) -> str:
        """What it chose on devices of this type where its table leaves it open; empty where nothing is."""
        return ""

    def grow_from(self, base: Any) -> None:
        """Become what this mixer is at its width when its settings were found on ``base``, the same one at another width.

        For the maximal update parametrization, which scales weights by itself; override where more depends on a size, such as
        the scale of products of growing heads.
        """


class SequenceMixer(BaseMixer):
    """A mixer in three steps: ``project`` to streams of heads, ``mix`` along the sequence, ``merge`` to the model.

    ``mix`` is pure: it sees plain local tensors, never a mesh, a module or a head count, so one declaration serves
    tensor and context parallelism. parallel/ wraps that step alone, through ``mix_step``.
    """

    tensor_parallel: ClassVar[Mapping[str, Split]]
    """Every direct child and parameter, and every computed entry of ``head_params``."""
    context_parallel: ClassVar[tuple[ContextParallel, ...]]
    """In order of preference."""
    float8: ClassVar[frozenset[str]] = frozenset()
    """The Linears that may go to float8."""
    fp32: ClassVar[frozenset[str]] = frozenset()
    """Children that stay fp32 in compute: each becomes an FSDP unit of its own."""

    mix_step: Mix = staticmethod(mix_whole)

    @abstractmethod
    def __init__(self, config: Any, shape: ModelShape, layer: int) -> None:
        """Allocate parameters; ``layer`` counts blocks from 0."""
        super().__init__()
        self.config = config
        self.layer = layer
        self.declared_streams = self.streams(config, shape)

    @staticmethod
    @abstractmethod
    def streams(config: Any, shape: ModelShape) -> Mapping[str, Stream]:
        """The streams that ``project`` makes: side and global head count of each."""

    @abstractmethod
    def project(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        """Streams [B, T, heads, ...] of the local heads."""

    @staticmethod
    @abstractmethod
    def mix(config: Any, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: State | None = None) -> MixResult:
        """Mix along the sequence: y [B, T, H, V]. Take head counts from shapes, never from ``config``."""

    @abstractmethod
    def merge(self, y_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """Back to the model: [B, T, D]."""

    def head_params(self, seq: SequenceInfo, carry: Carry) -> tuple[Mapping[str, Tensor], Carry]:
        """Every PER_HEAD and SHARED tensor that ``mix`` reads, of all heads: parameters in fp32, and tables.

        By default what the child ``head`` holds, where there is a HeadParams of that name.
        """
        head = self._modules.get("head")
        return (head() if isinstance(head, HeadParams) else {}), carry

    def initial_state(self, n_rows: int, dtype: torch.dtype, device: torch.device) -> State:
        """The state before the first token, for ``step``."""
        raise NotImplementedError(f"{type(self).__qualname__} declares no initial_state, so it cannot decode a token at a time")

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Tensor, Carry]:
        """merge(mix(project(x))). Final: override the three steps instead."""
        streams, carry = self.project(x_BTD, seq, carry)
        head_params, carry = self.head_params(seq, carry)
        result = self.mix_step(self, streams, head_params, MixSequence(query=seq, key=seq, site=self.layer))
        return self.merge(result.y_BTHV, x_BTD), carry

    def run(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Tensor, Carry]:
        out: tuple[Tensor, Carry] = self(x_BTD, seq, carry)
        return out

    def step(self, x_B1D: Tensor, seq: MixSequence, carry: Carry, state: State) -> tuple[Tensor, Carry, State]:
        """One token, [B, 1, D], after ``state``; equals that position of ``forward`` on the whole row."""
        streams, carry = self.project(x_B1D, seq.query, carry)
        head_params, carry = self.head_params(seq.key, carry)
        result = self.mix(self.config, streams, head_params, seq, state)
        assert result.state is not None, f"{type(self).__qualname__}.mix was given a state and returned none"
        return self.merge(result.y_BTHV, x_B1D), carry, result.state


class RecurrentMixer(SequenceMixer):
    """A mixer whose memory of the past is a state of fixed size, handed over by STATE.

    ``mix`` takes the incoming state under the name ``recurrent``; what convolutions and token shifts need comes
    from ``seq.previous``.
    """

    @staticmethod
    @abstractmethod
    def transition(config: Any, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> Transition:
        """What this shard does to the state, in fp32, without the outputs."""

    @staticmethod
    def compose(later: Transition, earlier: Transition) -> Transition:
        """``later`` after ``earlier``; override where decay is a matrix."""
        return Transition(later.decay * earlier.decay, later.decay * earlier.state + later.state)


class LocalMixer(BaseMixer):
    """The way in for an idea that keeps none of the contract: ``__init__(config, shape, layer)`` and ``forward(x, seq)``.

    It trains at once under FSDP2 and activation checkpointing; tensor parallelism, context parallelism and float8
    are refused by name before launch.
    """

    @abstractmethod
    def __init__(self, config: Any, shape: ModelShape, layer: int) -> None:
        """Allocate parameters; ``layer`` counts blocks from 0."""
        super().__init__()

    @abstractmethod
    def forward(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        """What is added to the residual stream, [B, T, D]."""

    def run(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Tensor, Carry]:
        out: Tensor = self(x_BTD, seq)
        return out, carry


MIXERS: Registry[BaseMixer] = Registry("mixer")
mixer = MIXERS.register
