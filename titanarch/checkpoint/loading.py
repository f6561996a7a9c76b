"""Reading a checkpoint into the objects of a run."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.stateful import Stateful

from titanarch.checkpoint.errors import CheckpointError, load_failed
from titanarch.checkpoint.processes import Processes
from titanarch.checkpoint.storage import Storage
from titanarch.checkpoint.torch_io import TensorsOnlyPlanner
from titanarch.checkpoint.values import TreePath, decode, flatten, unflatten
from titanarch.config.errors import ConfigError, Problem, did_you_mean

Entry = Stateful | dict[str, Any]
State = Mapping[str, Entry]
"""The objects of a run by name ("model", "optimizer", "data" ...). A plain dict is saved as it is and replaced in place."""

Leaves = dict[str, tuple[TreePath, Any]]
"""Path and value of each leaf of an object's state, by its full name: ``model.blocks.0.wq.weight``."""

_VALUES = "__values__"
_SHOWN = 10


def values_name(entry: str) -> str:
    """The tensor that holds the plain values of an object, beside its tensors."""
    return f"{entry}.{_VALUES}"


def leaves_of(name: str, entry: Entry) -> Leaves:
    """The leaves of an object's state. ValueError where two have one name, or the object's name has a dot."""
    if "." in name:
        raise ValueError(f"'{name}' must not hold a dot: dots separate the levels of a checkpoint's names")
    tree = entry.state_dict() if isinstance(entry, Stateful) else entry
    leaves: Leaves = {}
    for path, leaf in flatten(tree).items():
        full_name = ".".join((name, *path))
        if full_name in leaves or full_name == values_name(name):
            raise ValueError(f"the state of '{name}' has two leaves named '{full_name}'")
        leaves[full_name] = (path, leaf)
    return leaves


def read(storage: Storage, folder: str, state: State, *, processes: Processes) -> None:
    """Load every object of ``state`` from a checkpoint that was saved on any number of processes. Collective.

    Objects of the checkpoint that ``state`` does not name are left alone.

    Raises:
        CheckpointError: names, shapes or dtypes differ (all are listed), or the files cannot be read.
    """
    index = storage.index(folder)
    leaves = {name: leaves_of(name, entry) for name, entry in state.items()}
    problems = mismatches(leaves, index, excluded=frozenset(), same_dtype=True)
    if problems:
        raise CheckpointError(f"{storage.path(folder)} does not fit this run: {_listed(problems)}")
    _read(storage, folder, state, leaves, index=index, excluded=frozenset(), processes=processes)


def read_initial(storage: Storage, folder: str, state: State, *, exclude: Sequence[str], processes: Processes) -> None:
    """Load ``state`` from the checkpoint of another run, but for the names that ``exclude`` matches. Collective.

    Floating-point tensors are converted to the dtype of the run.

    Raises:
        ConfigError: names or shapes differ and are not excluded, or a pattern matches nothing.
    """
    index = storage.index(folder)
    leaves = {name: leaves_of(name, entry) for name, entry in state.items()}
    names = {name for group in leaves.values() for name in group} | set(index.state_dict_metadata)
    unused = [pattern for pattern in exclude if not any(_matches(name, pattern) for name in names)]
    if unused:
        reasons = [f"'{pattern}' matches no name{did_you_mean(pattern, names)}"[:400] for pattern in unused]
        raise ConfigError(*(Problem(reason, key="checkpoint.exclude_from_loading") for reason in reasons))
    excluded = frozenset(name for name in names if any(_matches(name, pattern) for pattern in exclude))
    problems = mismatches(leaves, index, excluded=excluded, same_dtype=False)
    if problems:
        message = (
            f"{storage.path(folder)} does not fit this run: {_listed(problems)}. "
            "Change [model], or name what is to keep its fresh values in checkpoint.exclude_from_loading"
        )
        raise ConfigError(Problem(message, key="checkpoint.initial_load_path"))
    _read(storage, folder, state, leaves, index=index, excluded=excluded, processes=processes)


def mismatches(leaves: Mapping[str, Leaves], index: Metadata, *, excluded: frozenset[str], same_dtype: bool) -> list[str]:
    """What differs between the tensors of a run and those of a checkpoint, one line each; ``excluded`` names do not count."""
    problems = []
    for entry, own in leaves.items():
        saved = _saved(entry, index)
        if excluded and not (own.keys() | saved.keys()) - excluded:
            continue
        if values_name(entry) not in saved:
            problems.append(f"it holds no '{entry}'")
            continue
        saved = {name: meta for name, meta in saved.items() if name not in excluded and name != values_name(entry)}
        tensors = {name: leaf for name, (_, leaf) in own.items() if isinstance(leaf, Tensor) and name not in excluded}
        problems += [f"{name} is missing in the checkpoint" for name in tensors if name not in saved]
        problems += [f"{name} is only in the checkpoint" for name in saved if name not in tensors]
        for name, tensor in tensors.items():
            meta = saved.get(name)
            if isinstance(meta, TensorStorageMetadata) and meta.size != tensor.shape:
                problems.append(f"{name} has shape {tuple(tensor.shape)} here and {tuple(meta.size)} in the checkpoint")
            elif isinstance(meta, TensorStorageMetadata) and same_dtype and meta.properties.dtype != tensor.dtype:
                problems.append(f"{name} is {tensor.dtype} here and {meta.properties.dtype} in the checkpoint")
    return problems


def _read(
    storage: Storage,
    folder: str,
    state: State,
    leaves: Mapping[str, Leaves],
    *,
    index: Metadata,
    excluded: frozenset[str],
    processes: Processes,
) -> None:
    """Fill the tensors of ``leaves`` in place, then hand each object its tree."""
    wanted = {entry: own for entry, own in leaves.items() if (own.keys() | _saved(entry, index).keys()) - excluded}
    tensors: dict[str, Tensor] = {}
    for entry, own in wanted.items():
        tensors |= {name: leaf for name, (_, leaf) in own.items() if isinstance(leaf, Tensor) and name not in excluded}
        meta = index.state_dict_metadata[values_name(entry)]
        assert isinstance(meta, TensorStorageMetadata), "plain values are stored as a tensor"
        tensors[values_name(entry)] = torch.empty(meta.size, dtype=torch.uint8)
    try:
        load_tensors(
            tensors,
            storage_reader=storage.reader(folder, index),
            planner=TensorsOnlyPlanner(),
            process_group=processes.group,
            no_dist=not processes.distributed,
        )
    except (CheckpointException, OSError) as error:
        raise load_failed(error, storage.path(folder)) from error
    for entry, own in wanted.items():
        values = {path: value for path, value in decode(tensors[values_name(entry)]).items() if ".".join((entry, *path)) not in excluded}
        kept = {path: leaf for name, (path, leaf) in own.items() if isinstance(leaf, Tensor) or name in excluded}
        _hand_over(state[entry], unflatten(kept | values))


def _saved(entry: str, index: Metadata) -> dict[str, STORAGE_TYPES]:
    """What a checkpoint holds of an object, by full name."""
    return {name: meta for name, meta in index.state_dict_metadata.items() if name.startswith(entry + ".")}


def _hand_over(entry: Entry, tree: dict[str, Any]) -> None:
    if isinstance(entry, Stateful):
        entry.load_state_dict(tree)
    else:
        entry.clear()
        entry.update(tree)


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern names ``name``, or something that it lies in."""
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".")


def _listed(problems: Sequence[str]) -> str:
    more = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
