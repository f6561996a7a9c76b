"""Collectives as they pass torch's dispatcher: which one, over which group, how many bytes a process sends.

Bytes are what a process must send when no byte is sent twice: with n processes, (n - 1)/n of the whole for an all-gather, a
reduce-scatter and an all-to-all, twice that for an all-reduce (a reduce-scatter, then an all-gather; Thakur et al., 2005).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup, _resolve_process_group

SEND = "send"
_FUNCTIONAL = "_c10d_functional::"


class Group(NamedTuple):
    """``name`` of the process group. ``functional``: called as a function of tensors, as tensor and context parallelism do.

    Two axes with the same processes may share a group: then this tells them from FSDP2, whose collectives write to buffers.
    """

    name: str
    functional: bool


@dataclass(frozen=True)
class Collective:
    """``kind``: all_gather, reduce_scatter, all_reduce, all_to_all, broadcast, send. ``sent_bytes``: by this process, see the module."""

    kind: str
    group: "Group"
    sent_bytes: float


@dataclass(frozen=True)
class _Form:
    """Where an operator keeps what is counted: ``whole`` of args is the larger tensor, ``times_group``: times the processes."""

    kind: str
    whole: int
    group: int
    times_group: bool = False


_FORMS: Mapping[str, _Form] = {
    "c10d::_allgather_base_": _Form("all_gather", 0, 2),
    "c10d::allgather_": _Form("all_gather", 0, 2),
    "c10d::_reduce_scatter_base_": _Form("reduce_scatter", 1, 2),
    "c10d::allreduce_": _Form("all_reduce", 0, 1),
    "c10d::broadcast_": _Form("broadcast", 0, 1),
    "c10d::alltoall_base_": _Form("all_to_all", 1, 2),
    "c10d::send": _Form(SEND, 0, 1),
    "_c10d_functional::all_reduce": _Form("all_reduce", 0, 2),
    "_c10d_functional::all_reduce_": _Form("all_reduce", 0, 2),
    "_c10d_functional::all_gather_into_tensor": _Form("all_gather", 0, 2, times_group=True),
    "_c10d_functional::all_gather_into_tensor_out": _Form("all_gather", 0, 2, times_group=True),
    "_c10d_functional::reduce_scatter_tensor": _Form("reduce_scatter", 0, 3),
    "_c10d_functional::all_to_all_single": _Form("all_to_all", 0, 3),
}

_SHARE_FACTOR = {"all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0, "all_reduce": 2.0}
_SPLITS_OF_INPUT = {"_c10d_functional::all_to_all_single": 2, "c10d::alltoall_base_": 4}
"""Where an all-to-all says how many rows go to each process; empty or None: as many to each."""


def collective_of(name: str, args: tuple[Any, ...]) -> Collective | None:
    """What the operator ``name`` (``namespace::name``) sends; None where it is no collective."""
    form = _FORMS.get(name)
    if form is None:
        return None
    group = args[form.group]
    group = _resolve_process_group(group) if isinstance(group, str) else ProcessGroup.unbox(group)  # type: ignore[arg-type]
    n = group.size()
    whole = _bytes(args[form.whole]) * (n if form.times_group else 1)
    if form.kind in ("broadcast", SEND):
        sent = float(whole)
    else:
        sent = _SHARE_FACTOR[form.kind] * whole * (n - 1) / n
        rows = args[_SPLITS_OF_INPUT[name]] if name in _SPLITS_OF_INPUT else None
        if rows and sum(rows):
            sent = whole * (sum(rows) - rows[group.rank()]) / sum(rows)
    return Collective(form.kind, Group(group.group_name, name.startswith(_FUNCTIONAL)), sent)


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))


def name_of(func: Any) -> str:
    """``namespace::name`` of an operator, without its overload."""
    return str(func._schema.name) if isinstance(func, torch._ops.OpOverload) else ""
