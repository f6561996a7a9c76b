"""The state of an object as tensors and plain values, and plain values as bytes that are safe to read.

A *tree* is what ``state_dict()`` returns: nested dicts with string keys whose leaves are tensors or plain values
(None, bool, int, float, str, bytes, and lists, tuples and dicts of them). Plain values are stored as JSON, never
pickled, so reading them executes nothing; floats and integers come back exactly.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TreePath = tuple[str, ...]


def flatten(tree: Mapping[str, Any]) -> dict[TreePath, Any]:
    """Leaves by path. An empty dict, and a dict with a key that is no string, is a leaf itself."""
    leaves: dict[TreePath, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and all(isinstance(k, str) for k in value):
            leaves.update({(key, *path): leaf for path, leaf in flatten(value).items()})
        else:
            leaves[(key,)] = value
    return leaves


def unflatten(leaves: Mapping[TreePath, Any]) -> dict[str, Any]:
    """The tree whose leaves are given."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def tensors_of(leaves: Mapping[TreePath, Any]) -> dict[TreePath, Tensor]:
    """The leaves that are tensors."""
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Tensor)}


def encode(leaves: Mapping[TreePath, Any]) -> Tensor:
    """The leaves that are no tensors, as JSON in a uint8 tensor [bytes]. TypeError names a leaf that cannot be stored."""
    rows = [[list(path), _to_json(leaf, path)] for path, leaf in leaves.items() if not isinstance(leaf, Tensor)]
    return torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)


def decode(data: Tensor) -> dict[TreePath, Any]:
    """The inverse of ``encode``."""
    rows = json.loads(bytes(data.numpy()))
    return {tuple(path): _from_json(value) for path, value in rows}


def _to_json(value: Any, path: TreePath) -> Any:
    """Scalars as they are; everything else as a one-key object naming its type."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_to_json(item, path) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[_to_json(key, path), _to_json(item, path)] for key, item in value.items()]}
    raise TypeError(
        f"the state '{'.'.join(path)}' holds a {type(value).__name__}, which a checkpoint cannot store; "
        "use None, bool, int, float, str, bytes, lists, tuples and dicts of them, or a tensor under a string key"
    )


def _from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "dict":
        return {_from_json(key): _from_json(item) for key, item in content}
    return [_from_json(item) for item in content] if kind == "list" else tuple(_from_json(item) for item in content)
