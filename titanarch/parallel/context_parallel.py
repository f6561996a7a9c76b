"""Context parallelism: the sequence is divided, and only the mix step communicates.

Each process holds contiguous shards of the same rows. Shapes: B rows, T local tokens, H heads.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from titanarch.contract.mixer import Mix, MixResult, RecurrentMixer, SequenceMixer, Streams, Transition
from titanarch.contract.sequence import Halo, MixSequence, SequenceInfo
from titanarch.contract.split import ContextParallel, Side
from titanarch.parallel.collectives import gather_sequence, gather_stacked, heads_to_sequence, sequence_to_heads
from titanarch.parallel.heads import heads_read_by, select_heads, split_head_params


class ContextHalo(Halo):
    """Brings the last tokens of the shard before this one, from an all-gather of all shards' tails."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def shift(self, x: Tensor, n: int) -> Tensor:
        if n > x.shape[1]:
            raise ValueError(f"{n} tokens are wanted from before a shard of {x.shape[1]}; divide the sequence among fewer processes")
        tails = gather_stacked(x[:, x.shape[1] - n :], self.group)
        # The same graph on every process, or the backward's collectives would not pair up.
        before = torch.cat([torch.zeros_like(tails[:1]), tails])[self.group.rank()]
        return torch.cat([before, x[:, : x.shape[1] - n]], dim=1)


def shard_sequence(seq: SequenceInfo, group: ProcessGroup) -> SequenceInfo:
    """This process's contiguous part of ``seq``, whose rows are whole."""
    degree, rank = group.size(), group.rank()
    if seq.length % degree:
        raise ValueError(f"{seq.length} tokens cannot be divided among {degree} processes")
    part = slice(rank * seq.length // degree, (rank + 1) * seq.length // degree)
    return replace(
        seq,
        position_BT=seq.position_BT[:, part],
        document_BT=seq.document_BT[:, part],
        index_T=seq.index_T[part],
        halo=ContextHalo(group),
        whole_row=seq,
    )


class _ContextMix:
    def __init__(self, group: ProcessGroup, inner: Mix) -> None:
        self.group = group
        self.inner = inner

    def whole(self, seq: SequenceInfo) -> SequenceInfo:
        assert seq.whole_row is not None, "a sequence under context parallelism comes from shard_sequence"
        return seq.whole_row


class HeadsMix(_ContextMix):
    """Whole rows of a slice of the heads."""

    def __call__(self, mixer: SequenceMixer, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> MixResult:
        degree, rank = self.group.size(), self.group.rank()
        n_query = next(streams[name].shape[2] for name, stream in mixer.declared_streams.items() if stream.side is Side.QUERY)
        if n_query % degree:
            raise ValueError(f"{n_query} heads cannot be divided among {degree} processes")
        first = rank * n_query // degree
        local = {}
        for name, x in streams.items():
            if x.shape[2] % degree == 0:
                local[name] = sequence_to_heads(x, self.group)
            else:
                read = heads_read_by(first, n_query // degree, n_query_heads=n_query, n_heads=x.shape[2])
                local[name] = select_heads(gather_sequence(x, self.group), read)
        params = split_head_params(head_params, mixer.tensor_parallel, rank=rank, degree=degree)
        whole = self.whole(seq.query)
        result = self.inner(mixer, local, params, replace(seq, query=whole, key=whole, first_head=seq.first_head + first))
        return MixResult(heads_to_sequence(result.y_BTHV, self.group))


class GatherMix(_ContextMix):
    """Local queries, all keys and values."""

    def __call__(self, mixer: SequenceMixer, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> MixResult:
        declared = mixer.declared_streams
        local = {name: gather_sequence(x, self.group) if declared[name].side is Side.KEY else x for name, x in streams.items()}
        return self.inner(mixer, local, head_params, replace(seq, key=self.whole(seq.key)))


class StateMix(_ContextMix):
    """Each shard's effect on the state is gathered; the shards before this one give its incoming state."""

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


MIX_BY_METHOD: Mapping[ContextParallel, type[_ContextMix]] = {
    ContextParallel.HEADS: HeadsMix,
    ContextParallel.GATHER: GatherMix,
    ContextParallel.STATE: StateMix,
}


def apply_context_parallel(mixer: SequenceMixer, group: ProcessGroup, method: ContextParallel) -> None:
    """Wrap the mix step of ``mixer``; its tokens then come from ``shard_sequence``."""
    if method not in mixer.context_parallel:
        declared = ", ".join(m.value for m in mixer.context_parallel)
        raise ValueError(f"{type(mixer).__qualname__} declares context parallelism by {declared}, not by {method.value}")
    if method not in MIX_BY_METHOD:
        available = ", ".join(m.value for m in MIX_BY_METHOD)
        raise ValueError(f"context parallelism by {method.value} is not in this version; available: {available}")
    mixer.mix_step = MIX_BY_METHOD[method](group, mixer.mix_step)  # type: ignore[assignment]
