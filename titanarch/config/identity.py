"""What a run *is*: the keys that may not change when it is resumed.

A key is identity or free as its section declares it. A section inside another decides for itself, except under a field
that is declared FREE. A component goes with the field that holds it: under a free field all of it is free; under an
identity field its name is identity, and its keys are what its own schema declares.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import date, time
from pathlib import PurePath
from typing import Any, Final

from titanarch.config.keys import KeyPath, join_key
from titanarch.config.registry import ComponentConfig
from titanarch.config.section import Section


def identity_table(config: Section) -> dict[str, Any]:
    """The identity keys, such as ``training.seq_len``, with values that JSON can hold. Keys that hold None are left out."""
    return {join_key(path): value for path, value in _section(config, ())}


def identity_hash(config: Section) -> str:
    """SHA-256 of the identity table, 64 hexadecimal digits. It does not depend on the order of keys."""
    text = json.dumps(identity_table(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def identity_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The keys in which two identity tables differ, as (key, saved value, current value); None stands for an absent key.

    Values compare as they would print in JSON, so NaN equals NaN, and a table read back from JSON equals the one written.
    """
    keys = dict.fromkeys([*current, *saved])
    return [(key, saved.get(key), current.get(key)) for key in keys if json.dumps(saved.get(key)) != json.dumps(current.get(key))]


def _section(config: Section, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    for name in type(config).model_fields:
        value = getattr(config, name)
        if value is not None and not _is_free(type(config), name):
            yield from _value(value, (*path, name), type(config).is_identity(name))


def _is_free(section: type[Section], field: str) -> bool:
    """Whether a field is declared free itself, and with it whatever it holds."""
    extra = section.model_fields[field].json_schema_extra
    return isinstance(extra, dict) and extra.get("identity") is False


_Holding: Final = (Section, Mapping, tuple, list)


def _value(value: Any, path: KeyPath, identity: bool) -> Iterator[tuple[KeyPath, Any]]:
    """``identity``: whether the field that holds the value is identity."""
    if isinstance(value, ComponentConfig):
        if identity:
            yield (*path, value.kind_key), value.kind
            yield from _section(value, path)
    elif isinstance(value, Section):
        yield from _section(value, path)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _value(item, (*path, key), identity)
    elif isinstance(value, tuple | list) and any(isinstance(item, _Holding) for item in value):
        for index, item in enumerate(value):
            yield from _value(item, (*path, index), identity)
    elif identity:
        yield path, _json(value)


def _json(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_json(item) for item in value]
    return str(value) if isinstance(value, date | time | PurePath) else value
