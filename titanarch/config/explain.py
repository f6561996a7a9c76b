"""Validation errors in words that tell where, which key, what value, what is allowed and what to do."""

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date, time
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from titanarch.config.dump import toml_value
from titanarch.config.errors import Problem, did_you_mean, shown
from titanarch.config.keys import KeyPath, join_key
from titanarch.config.overrides import COMMAND_LINE
from titanarch.config.places import ArrayOf, Form, MappingOf, forms_at, keys_at, places_of, sections
from titanarch.config.section import Section
from titanarch.config.tree import Node

_WANTED: Final = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "an array",
    "list_type": "an array",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "date_type": "a date",
    "datetime_type": "a date with time",
    "time_type": "a time",
    "none_required": "nothing",
}

_KEY_ERRORS: Final = ("missing", "extra_forbidden")
"""Errors whose last place is a key that is missing, or should be."""

_LIMITS: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "greater_than": lambda limit: f"must be > {plain_number(limit['gt'])}",
    "greater_than_equal": lambda limit: f"must be >= {plain_number(limit['ge'])}",
    "less_than": lambda limit: f"must be < {plain_number(limit['lt'])}",
    "less_than_equal": lambda limit: f"must be <= {plain_number(limit['le'])}",
    "multiple_of": lambda limit: f"must be a multiple of {plain_number(limit['multiple_of'])}",
    "finite_number": lambda limit: "must be finite",
    "too_short": lambda limit: f"needs {_count(limit['min_length'], 'item')} or more",
    "too_long": lambda limit: f"takes {_count(limit['max_length'], 'item')} or fewer",
    "string_too_short": lambda limit: f"needs {_count(limit['min_length'], 'character')} or more",
    "string_too_long": lambda limit: f"takes {_count(limit['max_length'], 'character')} or fewer",
    "string_pattern_mismatch": lambda limit: f"must match the pattern {limit['pattern']}",
}


@dataclass(frozen=True)
class _Finding:
    """One error of pydantic at a place of the configuration as it was written."""

    path: KeyPath
    error: ErrorDetails

    @property
    def kind(self) -> str:
        return self.error["type"]

    @property
    def context(self) -> dict[str, Any]:
        return self.error.get("ctx", {})

    def wanted(self) -> list[str]:
        """What the place would have taken, where that is all that is wrong."""
        if self.kind in ("literal_error", "enum"):
            return re.findall(r"'[^']*'|[^\s,']+", self.context["expected"].replace(" or ", ", "))
        if self.kind == "component_form":
            return [self.error["msg"]]
        return [_WANTED[self.kind]] if self.kind in _WANTED else []


def explain(error: ValidationError, schema: type[Section], tree: Node, *, unknown_components: bool = True) -> list[Problem]:
    """One Problem for each place that is wrong, in the order pydantic found them.

    ``unknown_components``: whether the names of unknown components are among them.
    """
    table = tree.plain()
    findings: dict[KeyPath, list[_Finding]] = {}
    for details in error.errors(include_url=False):
        path = _path(details, schema, table)
        findings.setdefault(path, []).append(_Finding(path, details))
    findings = _without_echoes(findings, tree)
    above = {path[:depth] for path in findings for depth in range(len(path))}
    problems = []
    for path, group in findings.items():
        if not unknown_components and any(finding.kind == "component" for finding in group):
            continue
        if path in above and all(finding.wanted() for finding in group):
            continue  # other members of a union; the one that fits best is explained below this place
        message = _message(group, schema, table, tree)
        node, depth = tree.find(path)
        # what is missing cannot have been written on the command line, though the table around it may
        origin = tree.origin if depth < len(path) and node.origin.file == COMMAND_LINE else node.origin
        problems.append(Problem(message, key=join_key(path), file=origin.file, line=origin.line))
    return problems


def _without_echoes(findings: dict[KeyPath, list[_Finding]], tree: Node) -> dict[KeyPath, list[_Finding]]:
    """Without what a validator copied to places that nobody wrote, where the original is wrong in the same way."""

    def mistake(path: KeyPath) -> str:
        key = path[-1] if findings[path][0].kind in _KEY_ERRORS else ""
        return repr((key, [(finding.error["msg"], finding.error["input"]) for finding in findings[path]]))

    written = {path for path in findings if tree.find(path)[1] >= len(path) - 1}
    originals = {mistake(path) for path in written}
    return {path: group for path, group in findings.items() if path in written or mistake(path) not in originals}


def _path(details: ErrorDetails, schema: type[Section], table: dict[str, Any]) -> KeyPath:
    """Where it is wrong: pydantic's location without the names of union members."""
    path: KeyPath = ()
    for part in details["loc"]:
        forms, value = forms_at(schema, table, path)
        if _leads_on(part, forms, value):
            path = (*path, part)
    last = details["loc"][-1:]
    names_a_key = details["type"] in _KEY_ERRORS and isinstance(last[0], str)
    return (*path, *last) if names_a_key and path[-1:] != last else path


def _leads_on(part: str | int, forms: tuple[Form, ...], value: Any) -> bool:
    """Whether ``part`` is a key or index of a place that holds ``value``; what a validator put there counts too."""
    if (isinstance(value, dict) and part in value) or part in keys_at(forms, value):
        return True
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return value is None and any(isinstance(form, MappingOf if isinstance(part, str) else ArrayOf) for form in forms)


def _message(group: list[_Finding], schema: type[Section], table: dict[str, Any], tree: Node) -> str:
    """All that is wrong at one place."""
    first = group[0]
    if first.kind == "extra_forbidden":
        return _unknown_key(first.path, schema, table)
    if first.kind == "missing" and isinstance(last := group[-1].error["loc"][-1], int):  # of an array of fixed length
        return f"needs {_count(last + 1, 'item')} or more, got {describe(_value(first, tree))}"
    if first.kind == "missing":
        return _missing_key(first.path, schema, table)
    wanted = list(dict.fromkeys(want for finding in group for want in finding.wanted()))
    others = [finding for finding in group if not finding.wanted()]
    if others:
        return "; ".join(dict.fromkeys(_other(finding, _value(finding, tree)) for finding in others))
    value = _value(first, tree)
    remedy = _remedy(wanted, value, tree.find(first.path)[0].origin.file == COMMAND_LINE, first.path)
    return f"wants {_either(wanted)}, got {describe(value)}{remedy}"


def _value(finding: _Finding, tree: Node) -> Any:
    """What the user wrote, which validators may have changed on the way."""
    node, depth = tree.find(finding.path)
    return node.plain() if depth == len(finding.path) else finding.error["input"]


def _unknown_key(path: KeyPath, schema: type[Section], table: dict[str, Any]) -> str:
    key = str(path[-1])
    unknown = "unknown table" if len(path) == 1 and isinstance(table[key], dict) else "unknown key"
    allowed = keys_at(*forms_at(schema, table, path[:-1]))
    if not difflib.get_close_matches(key, allowed, n=1, cutoff=0.6):
        elsewhere = [f"'{join_key(place)}'" for place in places_of(key, schema, table)]
        if elsewhere:
            return f"{unknown}; did you mean {_either(elsewhere)}?"
    return unknown + did_you_mean(key, allowed)


def _missing_key(path: KeyPath, schema: type[Section], table: dict[str, Any]) -> str:
    forms, holder = forms_at(schema, table, path[:-1])
    for form in forms:
        for section in sections(form, holder):
            field = section.model_fields.get(str(path[-1]))
            if field is not None and field.description:
                return f"missing, and has no default; it is: {field.description}"
    return "missing, and has no default"


def _other(finding: _Finding, value: Any) -> str:
    """An error that is more than a wrong type."""
    if finding.kind in _LIMITS:
        return f"{_LIMITS[finding.kind](finding.context)}, got {describe(value)}"
    if "error" in finding.context:  # raised by a validator
        return str(finding.context["error"])
    return finding.error["msg"]


def _remedy(wanted: list[str], value: Any, on_command_line: bool, path: KeyPath) -> str:
    """What to do about a wrong type, where that is plain."""
    if isinstance(value, str):
        choices = [want[1:-1] for want in wanted if want[0] == "'"]
        if choices and difflib.get_close_matches(value, choices, n=1, cutoff=0.6):
            return did_you_mean(value, choices)
        if "true or false" in wanted and value.lower() in ("true", "false"):
            return f"; write {value.lower()}{'' if on_command_line else ', without quotes'}"
        if {"an integer", "a number"} & set(wanted) and re.fullmatch(r"[+-]?[\d_.]+(e[+-]?\d+)?", value):
            return f"; write {value}{'' if on_command_line else ', without quotes'}"
    elif "a string" in wanted and on_command_line and not isinstance(value, dict | list):
        return f"; write --{join_key(path)}='\"{toml_value(value)}\"'"
    elif "an integer" in wanted and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    return ""


def describe(value: Any) -> str:
    """A TOML value with its type, as an error shows it."""
    if isinstance(value, str):
        return f"the string {shown(value)}"
    if isinstance(value, dict | list):
        text = toml_value(value)
        text = text if len(text) <= 80 else text[:77] + "..."
        return f"the {'table' if isinstance(value, dict) else 'array'} {text}"
    names = {bool: "the boolean", int: "the integer", float: "the number"}
    name = names.get(type(value), "the date or time" if isinstance(value, date | time) else "")
    return f"{name} {toml_value(value)}" if name else shown(value)


def plain_number(value: float) -> str:
    """A bound as short as it can be said without loss."""
    return str(int(value)) if isinstance(value, int) or (value.is_integer() and abs(value) < 2**53) else repr(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _either(choices: Iterable[str]) -> str:
    *most, last = choices
    return f"{', '.join(most)} or {last}" if most else last
