"""Tensor parallelism of a mixer from its Split declarations alone.

COLUMN layers, ROW layers and SHARED parameters become DTensors over the group; head_params are cut by head at the mix
step. What is replicated and used on local heads has its gradient summed.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from titanarch.contract.layers import HeadNorm, Linear
from titanarch.contract.mixer import Mix, MixResult, SequenceMixer, Streams
from titanarch.contract.sequence import MixSequence
from titanarch.contract.split import Split
from titanarch.parallel.collectives import sum_gradients, sum_parts
from titanarch.parallel.heads import heads_read_by, select_heads, split_head_params


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


def apply_tensor_parallel(mixer: SequenceMixer, mesh: DeviceMesh) -> None:
    """Divide ``mixer`` over the one axis of ``mesh``. Raises ValueError where a child or parameter is not declared."""
    group, degree = mesh.get_group(), mesh.size()
    n_query_heads = max(stream.n_heads for stream in mixer.declared_streams.values())
    if n_query_heads % degree:
        raise ValueError(f"{type(mixer).__qualname__}: {n_query_heads} heads cannot be divided among {degree} processes")
    for name, child in mixer.named_children():
        _split_child(_declared(mixer, name), child, mixer, mesh)
    for name, _ in list(mixer.named_parameters(recurse=False)):
        if _declared(mixer, name) != Split.SHARED:
            raise ValueError(f"{type(mixer).__qualname__}.{name}: a parameter outside HeadParams can only be SHARED")
        _distribute(mixer, name, mesh, None)
    mixer.mix_step = TensorParallelMix(group, n_query_heads, mixer.mix_step)
    mixer.register_forward_pre_hook(lambda _, args: (sum_gradients(args[0], group), *args[1:]))


def _declared(mixer: SequenceMixer, name: str) -> Split:
    if name not in mixer.tensor_parallel:
        raise ValueError(
            f"{type(mixer).__qualname__}.tensor_parallel does not declare '{name}'; say COLUMN, ROW, PER_HEAD, SHARED or REPLICATED"
        )
    return mixer.tensor_parallel[name]


def _split_child(split: Split, child: nn.Module, mixer: SequenceMixer, mesh: DeviceMesh) -> None:
    group = mesh.get_group()
    if isinstance(child, HeadNorm):
        child.degree = mesh.size()
        child.reduce = lambda x: sum_gradients(sum_parts(x, group), group)
    elif split.kind == "column":
        n_heads = getattr(mixer.config, split.heads) or getattr(mixer.config, "n_heads")  # noqa: B009
        dim = 0 if n_heads % mesh.size() == 0 else None
        for name, _ in list(child.named_parameters()):
            _distribute(child, name, mesh, dim)
    elif split.kind == "row":
        assert isinstance(child, Linear), "ROW is declared for Linears only"
        _distribute(child, "weight", mesh, 1)
        if child.bias is not None:
            _distribute(child, "bias", mesh, None)
        child.reduce_output = lambda x: sum_parts(x, group)
    elif split.kind == "shared":
        for name, _ in list(child.named_parameters()):
            _distribute(child, name, mesh, None)


def _distribute(module: nn.Module, name: str, mesh: DeviceMesh, dim: int | None) -> None:
    """Hold parameter ``name`` as a DTensor: divided along ``dim``, or whole where it is None."""
    parameter = module.get_parameter(name)
    placement = Replicate() if dim is None else Shard(dim)
    with torch.no_grad():
        divided = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(divided))
