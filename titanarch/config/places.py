"""What a schema allows at a place of the configuration: sections, components, arrays and tables of them.

The annotation of a field is taken at its word: a field whose validator makes something else out of the table than its
annotation says is described by its annotation.
"""

import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from pydantic.fields import FieldInfo

from titanarch.config.keys import KeyPath
from titanarch.config.registry import ComponentConfig, Registry
from titanarch.config.section import Section


@dataclass(frozen=True)
class Slot:
    """A component of a registry; ``implied`` is its name where its table gives none."""

    registry: Registry[Any]
    implied: str | None = None


@dataclass(frozen=True)
class ArrayOf:
    """An array. Where one item stands alone, it is taken for an array of one; the validation says whether it may."""

    items: tuple["Form", ...]


@dataclass(frozen=True)
class MappingOf:
    """A table with free names as keys. A component in it that gives no kind is of the kind it is named after."""

    values: tuple["Form", ...]


Form = type[Section] | Slot | ArrayOf | MappingOf


def field_forms(field: FieldInfo) -> tuple[Form, ...]:
    """What a field may hold that has keys or items; nothing where it holds scalars alone."""
    return _forms(field.annotation, field.metadata)


def _forms(annotation: Any, metadata: Iterable[Any] = ()) -> tuple[Form, ...]:
    registries = [item for item in metadata if isinstance(item, Registry)]
    if registries:
        return tuple(map(Slot, registries))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _forms(arguments[0], arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return tuple(form for argument in arguments for form in _forms(argument))
    if origin in (tuple, list, Sequence):
        items = tuple(form for argument in arguments if argument is not Ellipsis for form in _forms(argument))
        return (ArrayOf(items),)
    if origin in (dict, Mapping):
        return (MappingOf(_forms(arguments[1])),)
    return (annotation,) if isinstance(annotation, type) and issubclass(annotation, Section) else ()


def registry_at(forms: Iterable[Form]) -> Registry[Any] | None:
    """The registry whose components may stand at a place."""
    single = [each for form in forms for each in (form.items if isinstance(form, ArrayOf) else (form,))]
    return next((form.registry for form in single if isinstance(form, Slot)), None)


def component_name(value: Any, registry: Registry[Any]) -> str | None:
    """The name that a string or a table gives to a component."""
    name = value.get(registry.key) if isinstance(value, dict) else value
    return name if isinstance(name, str) else None


def sections(form: Form, value: Any) -> tuple[type[Section], ...]:
    """The schemas of a place that holds ``value``: of a registry's components all, where nothing names one."""
    if isinstance(form, Slot):
        name = component_name(value, form.registry) or form.implied
        names = list(form.registry) if name is None else [name] if name in form.registry else []
        return tuple(form.registry[each].Config for each in names)
    if isinstance(form, ArrayOf) and not isinstance(value, list):
        return tuple(section for item in form.items for section in sections(item, value))
    return (form,) if isinstance(form, type) else ()


def inside(forms: Iterable[Form], part: str | int, value: Any) -> tuple[Form, ...]:
    """What may stand under the key or index ``part`` of a place that holds ``value``."""
    found: list[Form] = []
    for form in forms:
        if isinstance(form, ArrayOf) and isinstance(part, int):
            found += form.items
        elif isinstance(form, MappingOf):
            found += [Slot(each.registry, str(part)) if isinstance(each, Slot) else each for each in form.values]
        else:
            for section in sections(form, value):
                if part in section.model_fields:
                    found += field_forms(section.model_fields[str(part)])
    return tuple(found)


def forms_at(schema: type[Section], table: dict[str, Any], path: KeyPath) -> tuple[tuple[Form, ...], Any]:
    """What may stand at ``path``, and what stands there (None where nothing does)."""
    forms: tuple[Form, ...] = (schema,)
    value: Any = table
    for part in path:
        forms = inside(forms, part, value)
        value = _item(value, part)
    return forms, value


def keys_at(forms: Iterable[Form], value: Any) -> set[str]:
    """The keys that a table at a place may have."""
    keys: set[str] = set()
    for form in forms:
        registry = registry_at((form,))
        keys |= {registry.key} if registry is not None else set()
        for section in sections(form, value):
            keys.update(section.model_fields)
    return keys


def places_of(key: str, schema: type[Section], table: dict[str, Any]) -> list[KeyPath]:
    """Every place of ``key`` in the schema, with the components and array items that ``table`` has."""
    found = ((*path, key) for path, section in _all_sections((schema,), table, (), ()) if key in section.model_fields)
    return list(dict.fromkeys(found))  # a place that takes one item or several is found twice


def _all_sections(
    forms: tuple[Form, ...], value: Any, path: KeyPath, above: tuple[type[Section], ...]
) -> Iterator[tuple[KeyPath, type[Section]]]:
    for form in forms:
        if isinstance(form, ArrayOf) and isinstance(value, dict | str):
            yield from _all_sections(form.items, value, path, above)
            continue
        if isinstance(form, ArrayOf | MappingOf):
            items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            for part, item in items:
                yield from _all_sections(inside((form,), part, value), item, (*path, part), above)
            continue
        if isinstance(form, Slot) and not (form.implied or component_name(value, form.registry)):
            continue
        for section in sections(form, value):
            if section in above:  # a schema that holds itself
                continue
            yield path, section
            for part, field in section.model_fields.items():
                item = _item(value, part)
                default = None if field.is_required() else field.get_default(call_default_factory=True)
                if item is None and isinstance(default, ComponentConfig):
                    item = default.kind
                yield from _all_sections(field_forms(field), item, (*path, part), (*above, section))


def _item(value: Any, part: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    if isinstance(value, list):
        return value[part] if isinstance(part, int) and part < len(value) else None
    return value if part == 0 else None


@dataclass(frozen=True)
class Reachable:
    """All that a schema can hold: its sections and those inside them, and the registries it picks components from."""

    sections: tuple[type[Section], ...]
    registries: tuple[Registry[Any], ...]


def reachable(schema: type[Section]) -> Reachable:
    """Everything that the schema leads to, in the order of its fields, components included."""
    found: dict[type[Section], None] = {}
    registries: dict[int, Registry[Any]] = {}
    forms: list[Form] = [schema]
    while forms:
        form = forms.pop(0)
        if isinstance(form, ArrayOf):
            forms[:0] = form.items
        elif isinstance(form, MappingOf):
            forms[:0] = form.values
        elif isinstance(form, Slot):
            registries[id(form.registry)] = form.registry
            forms += sections(form, None)
        elif form not in found:
            found[form] = None
            forms[:0] = [each for field in form.model_fields.values() for each in field_forms(field)]
    return Reachable(tuple(found), tuple(registries.values()))
