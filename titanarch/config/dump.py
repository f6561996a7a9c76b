"""A configuration as TOML text that loads to an equal configuration."""

from collections.abc import Iterator, Mapping
from datetime import date, time
from pathlib import PurePath
from typing import Any

from titanarch.config.keys import KeyPath, join_key, quote_key, quote_string
from titanarch.config.registry import ComponentConfig
from titanarch.config.section import Section

LINE_LENGTH = 120
"""Characters; a longer array is written with an item a line."""


def dump_toml(config: Section, *, notes: Mapping[str, str] | None = None) -> str:
    """Every key with its value, in the order of the schema; keys that hold None are left out.

    ``notes``: for keys such as ``training.steps``, what is written behind the value as a comment.
    ValueError where None stands for a key whose default is another value, since TOML has no way to write it.
    """
    lines = list(_table(to_table(config), (), notes or {}))
    return "\n".join(lines).strip("\n") + "\n"


def to_table(config: Section) -> dict[str, Any]:
    """The configuration as the plain table that a TOML file would hold."""
    table: dict[str, Any] = {config.kind_key: config.kind} if isinstance(config, ComponentConfig) else {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if value is not None:
            table[name] = plain(value)
        elif field.is_required() or field.get_default(call_default_factory=True) is not None:
            raise ValueError(f"{type(config).__qualname__}.{name} is None, which TOML cannot write and which is not its default")
    return table


def plain(value: Any) -> Any:
    """A value of a configuration as TOML would hold it."""
    if isinstance(value, Section):
        return to_table(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, PurePath):
        return str(value)
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def toml_value(value: Any) -> str:
    """A value on one line. TypeError where TOML has no such type."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quote_string(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{quote_key(key)} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    raise TypeError(f"TOML has no type for {value!r} of {type(value).__qualname__}")


def _table(table: Mapping[str, Any], path: KeyPath, notes: Mapping[str, str]) -> Iterator[str]:
    """The lines of a table: its own keys first, then the tables inside it."""
    for key, value in table.items():
        if not isinstance(value, dict) and not _is_array_of_tables(value):
            note = notes.get(join_key((*path, key)))
            yield f"{quote_key(key)} = {_array_or_value(value)}" + (f"  # {note}" if note else "")
    for key, value in table.items():
        inside = (*path, key)
        if isinstance(value, dict):
            if not value or any(not isinstance(item, dict) for item in value.values()):
                yield from ("", f"[{_header(inside)}]")
            yield from _table(value, inside, notes)
        elif _is_array_of_tables(value):
            for index, item in enumerate(value):
                yield from ("", f"[[{_header(inside)}]]")
                yield from _table(item, (*inside, index), notes)


def _header(path: KeyPath) -> str:
    return join_key(tuple(part for part in path if isinstance(part, str)))


def _is_array_of_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _array_or_value(value: Any) -> str:
    text = toml_value(value)
    if not isinstance(value, list) or len(text) <= LINE_LENGTH:
        return text
    return "[\n" + "".join(f"    {toml_value(item)},\n" for item in value) + "]"
