"""Context parallelism: the sequence is divided, and only the mix step communicates.

Shapes: B rows, T local tokens, H heads.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from titanarch.contract.mixer import Mix, MixResult, RecurrentMixer, SequenceMixer, Streams, Transition
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.split import ContextParallel, Side
from titanarch.parallel.collectives import gather_sequence, gather_stacked, heads_to_sequence, sequence_to_heads
from titanarch.parallel.context_layout import ContextLayout, part_of
from titanarch.parallel.heads import heads_read_by, select_heads, split_head_params
from titanarch.parallel.ring import Tensors, mix_in_ring


class ContextMix(ABC):
    """The mix step on this process's tokens of every row; ``inner`` is what it does with what it has gathered."""

    head_tail: bool
    """Whether it may be given head-tail parts."""
    gains_from_head_tail: bool
    """Whether those balance its work."""

    def __init__(self, layout: ContextLayout, inner: Mix) -> None:
        self.layout = layout
        self.inner = inner

    @property
    def group(self) -> ProcessGroup:
        return self.layout.group

    @staticmethod
    def why_not(mixer: SequenceMixer, degree: int, n_shares: int) -> str:
        """Why it does not fit ``mixer`` whose heads are already divided in ``n_shares``; empty where it does."""
        return ""

    @abstractmethod
    def __call__(self, mixer: SequenceMixer, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> MixResult: ...


def undivided(seq: SequenceInfo) -> SequenceInfo:
    assert seq.undivided is not None, "a sequence under context parallelism was divided"
    return seq.undivided


class HeadsMix(ContextMix):
    """Whole rows of a slice of the heads (DeepSpeed-Ulysses, arXiv:2309.14509)."""

    head_tail = True
    gains_from_head_tail = False

    @staticmethod
    def why_not(mixer: SequenceMixer, degree: int, n_shares: int) -> str:
        n_heads = query_heads(mixer) // n_shares
        return f"its {n_heads} heads a process are no multiple of {degree}" if n_heads % degree else ""

    def __call__(self, mixer: SequenceMixer, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> MixResult:
        degree, rank = self.group.size(), self.group.rank()
        n_query = next(streams[name].shape[2] for name, stream in mixer.declared_streams.items() if stream.side is Side.QUERY)
        if n_query % degree:
            raise ValueError(f"{n_query} heads cannot be divided among {degree} processes")
        first = rank * n_query // degree
        local = {}
        for name, x in streams.items():
            if x.shape[2] % degree == 0:
                local[name] = self.layout.in_order(sequence_to_heads(x, self.group))
            else:
                read = heads_read_by(first, n_query // degree, n_query_heads=n_query, n_heads=x.shape[2])
                local[name] = self.layout.in_order(select_heads(gather_sequence(x, self.group), read))
        params = split_head_params(head_params, mixer.tensor_parallel, rank=rank, degree=degree)
        whole = undivided(seq.query)
        result = self.inner(mixer, local, params, replace(seq, query=whole, key=whole, first_head=seq.first_head + first))
        return MixResult(heads_to_sequence(self.layout.by_rank(result.y_BTHV), self.group))


class GatherMix(ContextMix):
    """Local queries, all earlier keys and values (Llama 3, arXiv:2407.21783)."""

    head_tail = True
    gains_from_head_tail = True

    def __call__(self, mixer: SequenceMixer, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> MixResult:
        declared, whole = mixer.declared_streams, undivided(seq.key)
        keys = {
            name: self.layout.in_order(gather_sequence(x, self.group)) for name, x in streams.items() if declared[name].side is Side.KEY
        }
        outputs = []
        for number, part in enumerate(self.layout.own_parts):
            query = part_of(seq.query, number, len(self.layout.own_parts))
            # Keys after the part's end are invisible to it: every mixer is causal.
            end = (part + 1) * whole.length // self.layout.n_parts
            local = {name: keys[name][:, :end] if name in keys else self.layout.parts(x)[number] for name, x in streams.items()}
            outputs.append(self.inner(mixer, local, head_params, replace(seq, query=query, key=first_tokens(whole, end))).y_BTHV)
        return MixResult(outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1))


class RingMix(ContextMix):
    """Local queries; keys and values pass round, and partial results are merged (ring attention, arXiv:2310.01889)."""

    head_tail = True
    gains_from_head_tail = True

    def __call__(self, mixer: SequenceMixer, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> MixResult:
        declared = mixer.declared_streams
        queries = tuple(name for name in streams if declared[name].side is Side.QUERY)
        keys = tuple(name for name in streams if declared[name].side is Side.KEY)
        mix = _MixOfPart(self.layout, mixer, self.inner, replace(seq, key=undivided(seq.key)), queries, keys, tuple(head_params))
        query_streams, key_streams = [streams[name] for name in queries], [streams[name] for name in keys]
        return MixResult(mix_in_ring(self.layout, mix, query_streams, key_streams, list(head_params.values())))


@dataclass(frozen=True)
class _MixOfPart:
    """``inner`` on one part's queries and one part's keys. ``seq``: its keys are whole rows."""

    layout: ContextLayout
    mixer: SequenceMixer
    inner: Mix
    seq: MixSequence
    query_names: tuple[str, ...]
    key_names: tuple[str, ...]
    param_names: tuple[str, ...]

    def __call__(self, number: int, part: int, queries: Tensors, keys: Tensors, params: Tensors) -> tuple[Tensor, Tensor]:
        own_parts = self.layout.own_parts
        seq = replace(
            self.seq,
            query=part_of(self.seq.query, number, len(own_parts)),
            key=part_of(self.seq.key, part, self.layout.n_parts),
            wants_lse=True,
            holds_sinks=part == own_parts[number],
        )
        streams = dict(zip((*self.query_names, *self.key_names), (*queries, *keys), strict=True))
        result = self.inner(self.mixer, streams, dict(zip(self.param_names, params, strict=True)), seq)
        assert result.lse_BTH is not None, f"{type(self.mixer).__qualname__} declares RING, but its mix gives no lse_BTH"
        return result.y_BTHV, result.lse_BTH


class StateMix(ContextMix):
    """Each shard's effect on the state is gathered; the shards before this one give its incoming state (LASP-2, arXiv:2502.07563)."""

    head_tail = False
    gains_from_head_tail = False

    def __call__(self, mixer: SequenceMixer, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> MixResult:
        assert isinstance(mixer, RecurrentMixer), "STATE is declared by recurrent mixers only"
        own = mixer.transition(mixer.config, streams, head_params, seq)
        decays, states = gather_stacked(own.decay, self.group), gather_stacked(own.state, self.group)
        incoming = [Transition(torch.ones_like(decays[0]), torch.zeros_like(states[0]))]
        for decay, state in zip(decays.unbind(), states.unbind(), strict=True):
            incoming.append(mixer.compose(Transition(decay, state), incoming[-1]))
        # All prefixes, though one is used: the same graph on every process pairs up the backward's collectives.
        own_state = torch.stack([prefix.state for prefix in incoming])[self.group.rank()]
        return mixer.mix(mixer.config, streams, head_params, seq, {"recurrent": own_state})


MIX_BY_METHOD: Mapping[ContextParallel, type[ContextMix]] = {
    ContextParallel.HEADS: HeadsMix,
    ContextParallel.GATHER: GatherMix,
    ContextParallel.RING: RingMix,
    ContextParallel.STATE: StateMix,
}


def query_heads(mixer: SequenceMixer) -> int:
    """Heads of the whole mixer."""
    return max(stream.n_heads for stream in mixer.declared_streams.values() if stream.side is Side.QUERY)


def first_tokens(seq: SequenceInfo, end: int) -> SequenceInfo:
    """The first ``end`` tokens of whole rows, as keys."""
    return seq if end == seq.length else seq.some(lambda x, dim: x.narrow(dim, 0, end))


def choose_method(mixer: SequenceMixer, wanted: str, *, degree: int, n_shares: int = 1) -> tuple[ContextParallel | None, list[str]]:
    """The first method that ``mixer`` declares and that fits, and why each one before it does not; None if none is left.

    ``wanted``: a method's name, or ``auto``. ``n_shares``: the degree of tensor parallelism.
    """
    if wanted != "auto" and ContextParallel(wanted) not in mixer.context_parallel:
        declared = ", ".join(m.value for m in mixer.context_parallel) or "no method"
        return None, [f"{wanted}: it declares {declared}"]
    reasons: list[str] = []
    for method in mixer.context_parallel if wanted == "auto" else (ContextParallel(wanted),):
        reason = MIX_BY_METHOD[method].why_not(mixer, degree, n_shares)
        if not reason:
            return method, reasons
        reasons.append(f"{method.value}: {reason}")
    return None, reasons


def uses_head_tail(methods: Iterable[ContextParallel], wanted: str) -> bool:
    """Whether rows are divided head-tail; ValueError where that is wanted and a method cannot."""
    mixes = {MIX_BY_METHOD[method] for method in methods}
    if wanted == "contiguous":
        return False
    if wanted == "head_tail":
        if not all(mix.head_tail for mix in mixes):
            raise ValueError("a state is handed on in order")
        return True
    return all(mix.head_tail for mix in mixes) and any(mix.gains_from_head_tail for mix in mixes)


def apply_context_parallel(mixer: SequenceMixer, layout: ContextLayout, method: ContextParallel) -> None:
    """Wrap the mix step of ``mixer``; its tokens then come from ``layout.divide``."""
    if method not in mixer.context_parallel:
        declared = ", ".join(m.value for m in mixer.context_parallel)
        raise ValueError(f"{type(mixer).__qualname__} declares context parallelism by {declared}, not by {method.value}")
    mix = MIX_BY_METHOD[method]
    if layout.head_tail and not mix.head_tail:
        raise ValueError(f"context parallelism by {method.value} needs contiguous parts")
    mixer.mix_step = mix(layout, mixer.mix_step)
