"""Tensor parallelism from declarations alone.

COLUMN layers, ROW layers and SHARED parameters of mixers become DTensors over the group, and head_params are cut by head at
the mix step. Outside mixers the tokens are divided (sequence parallelism, arXiv:2205.05198): what stands there is whole on
every process and used on its own tokens, so its gradient is a part of a sum. What is used alike everywhere stays as it is.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from titanarch.contract.channel import ChannelMixer
from titanarch.contract.experts import Experts
from titanarch.contract.layers import HeadNorm, Linear
from titanarch.contract.mixer import Mix, MixResult, SequenceMixer, Streams
from titanarch.contract.model import Model
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.split import Split
from titanarch.parallel.collectives import gather_sequence, scatter_sum_sequence, sum_gradients, sum_parts
from titanarch.parallel.heads import heads_read_by, select_heads, split_head_params
from titanarch.parallel.vocabulary import DividedVocabulary, vocabulary_of

Mixing = SequenceMixer | ChannelMixer


class TensorParallelMix:
    """The mix step on the local heads of ``group``."""

    def __init__(self, group: ProcessGroup, n_query_heads: int, inner: Mix) -> None:
        self.group = group
        self.n_query_heads = n_query_heads
        self.inner = inner

    def __call__(self, mixer: SequenceMixer, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> MixResult:
        degree, rank, H = self.group.size(), self.group.rank(), self.n_query_heads
        first = rank * H // degree
        local = {}
        for name, x in streams.items():
            n_heads = mixer.declared_streams[name].n_heads
            if n_heads % degree:
                x = select_heads(x, heads_read_by(first, H // degree, n_query_heads=H, n_heads=n_heads))
            local[name] = x
        summed = {name: sum_gradients(value, self.group) for name, value in head_params.items()}
        params = split_head_params(summed, mixer.tensor_parallel, rank=rank, degree=degree)
        return self.inner(mixer, local, params, replace(seq, first_head=seq.first_head + first))


def divide_model(model: Model, mesh: DeviceMesh, vocab_size: int, *, sequence_parallel: bool, loss_parallel: bool) -> None:
    """Divide ``model`` over the one axis of ``mesh``: mixers by their declarations, the vocabulary, all else by token.

    ``vocab_size``: rows of the embedding. Raises ValueError where something is not declared or does not divide.
    """
    model.vocabulary = vocabulary_of(mesh.get_group(), vocab_size, sequence_parallel=sequence_parallel, loss_parallel=loss_parallel)
    divided = isinstance(model.vocabulary, DividedVocabulary)
    mixing = [module for module in model.modules() if isinstance(module, Mixing)]
    inside = {part for component in mixing for part in component.modules()}
    for component in mixing:
        apply_tensor_parallel(component, mesh, sequence_parallel=sequence_parallel)
    for prefix, module in model.named_modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            if f"{prefix}.{name}".lstrip(".") in model.vocabulary_parameters:
                if divided or sequence_parallel:
                    _distribute(module, name, mesh, 0 if divided else None)
            elif module not in inside and sequence_parallel:
                _distribute(module, name, mesh, None)


def apply_tensor_parallel(component: Mixing, mesh: DeviceMesh, *, sequence_parallel: bool = False) -> None:
    """Divide a mixer over the one axis of ``mesh``.

    ``sequence_parallel``: it is given, and gives back, this process's part of the tokens; its SequenceInfo was divided too.
    Raises ValueError where a child or parameter is not declared.
    """
    group, degree = mesh.get_group(), mesh.size()
    for name, child in component.named_children():
        _split_child(_declared(component, name), child, component, mesh, sequence_parallel=sequence_parallel)
    for name, _ in list(component.named_parameters(recurse=False)):
        if _declared(component, name) != Split.SHARED:
            raise ValueError(f"{type(component).__qualname__}.{name}: a parameter outside HeadParams can only be SHARED")
        _distribute(component, name, mesh, None)
    if isinstance(component, ChannelMixer):
        component.share = 1 / degree
    if isinstance(component, SequenceMixer):
        n_query_heads = max(stream.n_heads for stream in component.declared_streams.values())
        if n_query_heads % degree:
            raise ValueError(f"{type(component).__qualname__}: {n_query_heads} heads cannot be divided among {degree} processes")
        component.mix_step = TensorParallelMix(group, n_query_heads, component.mix_step)
    component.register_forward_pre_hook(_WholeTokens(group, sequence_parallel=sequence_parallel))


class _WholeTokens:
    """Gives a mixer all tokens of its group, and sums what its parts return for them."""

    def __init__(self, group: ProcessGroup, *, sequence_parallel: bool) -> None:
        self.group = group
        self.sequence_parallel = sequence_parallel

    def __call__(self, _component: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, seq, *rest = args
        if not self.sequence_parallel:
            return (sum_gradients(x, self.group), seq, *rest)
        assert isinstance(seq, SequenceInfo), "a mixer's second argument is its SequenceInfo"
        assert seq.undivided is not None, "under sequence parallelism the tokens were divided"
        return (gather_sequence(x, self.group), seq.undivided, *rest)


def _declared(component: Mixing, name: str) -> Split:
    if name not in component.tensor_parallel:
        raise ValueError(
            f"{type(component).__qualname__}.tensor_parallel does not declare '{name}'; say COLUMN, ROW, PER_HEAD, SHARED or REPLICATED"
        )
    return component.tensor_parallel[name]


def _split_child(split: Split, child: nn.Module, component: Mixing, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    group = mesh.get_group()
    if isinstance(child, HeadNorm):
        child.degree = mesh.size()
        child.reduce = lambda x: sum_gradients(sum_parts(x, group), group)
    elif isinstance(child, Experts):
        for name, dim in child.hidden_dims.items():
            _distribute(child, name, mesh, dim)
        child.reduce_output = lambda x: scatter_sum_sequence(x, group) if sequence_parallel else sum_parts(x, group)
    elif split.kind == "column":
        n_units = split.count(component.config)
        is_divided = n_units % mesh.size() == 0
        if isinstance(component, ChannelMixer):
            if not is_divided:
                raise ValueError(f"{type(component).__qualname__}: {n_units} hidden units, {mesh.size()} processes")
            component.first_unit = n_units // mesh.size() * group.rank()
        for name, _ in list(child.named_parameters()):
            _distribute(child, name, mesh, 0 if is_divided else None)
    elif split.kind == "row":
        assert isinstance(child, Linear), "ROW is declared for Linears only"
        _distribute(child, "weight", mesh, 1)
        if sequence_parallel and child.bias is not None:
            _distribute(child, "bias", mesh, None)
        child.reduce_output = lambda x: scatter_sum_sequence(x, group) if sequence_parallel else sum_parts(x, group)
    elif split.kind == "shared":
        for name, _ in list(child.named_parameters()):
            _distribute(child, name, mesh, None)


def _distribute(module: nn.Module, name: str, mesh: DeviceMesh, dim: int | None) -> None:
    """Hold parameter ``name`` as a DTensor: divided along ``dim``, or whole where it is None."""
    parameter = module.get_parameter(name)
    placement = Replicate() if dim is None else Shard(dim)
    with torch.no_grad():
        divided = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    owner, _, leaf = name.rpartition(".")
    (module.get_submodule(owner) if owner else module).register_parameter(leaf, nn.Parameter(divided))
