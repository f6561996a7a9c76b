"""The JSON schema of a whole configuration (draft 2020-12), by which editors complete and check the keys of a TOML file."""

import math
from typing import Any

from pydantic.json_schema import models_json_schema

from titanarch.config.places import reachable
from titanarch.config.registry import SLOT, ComponentConfig, Registry
from titanarch.config.section import Section

_EXTENDS = {
    "description": "the file, or files, that this one is laid over; paths count from this file's folder",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}


def json_schema(schema: type[Section], *, whole: bool = False) -> dict[str, Any]:
    """The JSON schema of a file, whose missing keys may come from the files it extends.

    ``whole``: of the table after merging, in which no required key is missing and ``extends`` is gone.
    ValueError where two registries go by the same slot name.
    """
    found = reachable(schema)
    slots = {registry.slot: registry for registry in found.registries}
    if len(slots) < len(found.registries):
        raise ValueError(f"two registries have the same slot name, among {sorted(each.slot for each in found.registries)}")
    references, document = models_json_schema([(section, "validation") for section in found.sections], ref_template="#/$defs/{model}")
    names = {section: references[section, "validation"]["$ref"] for section in found.sections}
    definitions = document["$defs"]
    for section in found.sections:
        if issubclass(section, ComponentConfig):
            table = definitions[names[section].rpartition("/")[2]]
            table["properties"] = {section.kind_key: {"const": section.kind}, **table.get("properties", {})}
    writer = _Writer(slots, names, whole)
    definitions = {name: writer.rewrite(definition) for name, definition in definitions.items()}
    definitions |= {_slot_name(registry): writer.slot(registry) for registry in found.registries}
    root = definitions.pop(names[schema].rpartition("/")[2])
    if not whole:
        root["properties"] = {"extends": _EXTENDS, **root["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "titanarch configuration", **root, "$defs": definitions}


def _slot_name(registry: Registry[Any]) -> str:
    return f"slot-{registry.slot.replace(' ', '-')}"


class _Writer:
    """Rewrites the schemas that pydantic gives into those of a TOML file."""

    def __init__(self, slots: dict[str, Registry[Any]], names: dict[type[Section], str], whole: bool) -> None:
        self.slots = slots
        self.names = names
        self.whole = whole

    def rewrite(self, schema: Any) -> Any:
        """Without titles and nulls, and with components in their slots."""
        if isinstance(schema, list):
            return [self.rewrite(item) for item in schema]
        if not isinstance(schema, dict):
            return schema
        written: dict[str, Any] = {}
        for key, value in schema.items():
            if key == "properties":
                written[key] = {name: self.rewrite(item) for name, item in value.items()}
            elif key == SLOT:
                written["$ref"] = f"#/$defs/{_slot_name(self.slots[value])}"
            elif key in ("default", "const", "enum", "examples"):
                written |= {key: value} if _is_json(value) else {}
            elif key == "anyOf":
                options = [self.rewrite(item) for item in value if item != {"type": "null"}]
                written |= options[0] if len(options) == 1 else {"anyOf": options}
            elif key != "title" and (key != "required" or self.whole):
                written[key] = self.rewrite(value)
        named = schema.get("additionalProperties")
        if isinstance(named, dict) and SLOT in named:
            written["properties"] = self.named(self.slots[named[SLOT]])
        return written

    def slot(self, registry: Registry[Any]) -> dict[str, Any]:
        """A component by its name, or as a table that names it."""
        configs = {name: registry[name].Config for name in registry}
        bare = [name for name, config in configs.items() if not (self.whole and _has_required(config))]
        tables = [{"$ref": self.names[config], **({"required": [registry.key]} if self.whole else {})} for config in configs.values()]
        return {"description": registry.slot, "anyOf": [{"enum": bare}, *tables] if bare else tables}

    def named(self, registry: Registry[Any]) -> dict[str, Any]:
        """Components in a table of free names: one under its own name need not say its kind again."""
        other = {"$ref": f"#/$defs/{_slot_name(registry)}"}
        return {name: {"anyOf": [{"$ref": self.names[registry[name].Config]}, other]} for name in registry}


def _has_required(section: type[Section]) -> bool:
    return any(field.is_required() for field in section.model_fields.values())


def _is_json(value: Any) -> bool:
    """Whether JSON and TOML can hold a default: neither null nor, in JSON, infinite."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))
