"""The JSON schema, judged by an independent validator."""

import json
from typing import Annotated, Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import Field, ValidationError

from tests.config.small_run import MIXERS, MixerConfig, SmallRun
from tests.config.test_dump import TABLE
from titanarch.config.registry import Registry
from titanarch.config.schema import json_schema
from titanarch.config.section import OneOrMore, Section

MINIMAL: dict[str, Any] = {"model": "decoder", "training": {"steps": 1}}


@pytest.mark.parametrize("whole", [True, False])
def test_it_is_a_schema_of_its_draft_with_all_references_inside(whole: bool) -> None:
    schema = json_schema(SmallRun, whole=whole)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)
    text = json.dumps(schema, allow_nan=False)
    assert "x-slot" not in text
    references = set(_references(schema))
    assert references
    assert {reference.removeprefix("#/$defs/") for reference in references} <= set(schema["$defs"])


def _references(schema: Any) -> list[str]:
    if isinstance(schema, list):
        return [found for item in schema for found in _references(item)]
    if not isinstance(schema, dict):
        return []
    own = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
    return own + [found for item in schema.values() for found in _references(item)]


GOOD: list[dict[str, Any]] = [
    MINIMAL,
    TABLE,
    MINIMAL | {"model": {"name": "hnet", "stages": 3}},
    MINIMAL | {"model": {"name": "decoder", "relative": {"kind": "learned", "max_length": 3}}},
    MINIMAL | {"training": {"steps": 1, "warmup": "none", "betas": [0.1, 0.2], "tokens": 5}},
]

BAD: list[dict[str, Any]] = [
    {},
    {"model": "decoder"},
    MINIMAL | {"extra": 1},
    MINIMAL | {"model": {"dim": 3}},
    MINIMAL | {"model": "decodr"},
    MINIMAL | {"model": {"name": "hnet", "dim": 3}},
    MINIMAL | {"model": {"name": "decoder", "relative": "learned"}},
    MINIMAL | {"model": {"name": "decoder", "relative": {"kind": "learned"}}},
    MINIMAL | {"model": {"name": "decoder", "relative": {"slope": 1.0}}},
    MINIMAL | {"model": {"name": "decoder", "relative": ["alibi", 3]}},
    MINIMAL | {"model": {"name": "decoder", "mixers": {"attention": {"heads": 1}}}},
    MINIMAL | {"model": {"name": "decoder", "mixers": {"other": {"n_heads": 1}}}},
    MINIMAL | {"training": {"steps": 0}},
    MINIMAL | {"training": {"steps": 1, "warmup": "later"}},
    MINIMAL | {"training": {"steps": 1, "betas": [0.1]}},
    MINIMAL | {"data": {"sources": [{"weight": 1.0}]}},
]


@pytest.mark.parametrize(("table", "valid"), [(table, True) for table in GOOD] + [(table, False) for table in BAD])
def test_a_whole_table_is_valid_where_the_loader_finds_it_so(table: dict[str, Any], valid: bool) -> None:
    assert Draft202012Validator(json_schema(SmallRun, whole=True)).is_valid(table) == valid
    try:
        SmallRun.model_validate(table)
    except ValidationError:
        assert not valid
    else:
        assert valid


def test_a_file_may_leave_keys_to_those_it_extends() -> None:
    validator = Draft202012Validator(json_schema(SmallRun))
    assert validator.is_valid({"extends": "base.toml", "training": {"learning_rate": 1.0}, "model": {"relative": {"theta": 1.0}}})
    assert validator.is_valid({"extends": ["a.toml", "b.toml"]})
    assert not validator.is_valid({"extends": 3})
    assert not validator.is_valid({"extends": "base.toml", "trainig": {}})
    assert not validator.is_valid({"model": {"name": "decoder", "relative": {"teta": 1.0}}})


def test_editors_find_descriptions_defaults_and_names() -> None:
    schema = json_schema(SmallRun)
    training = schema["$defs"]["Training"]
    assert training["description"] == "How long and on what."
    assert training["properties"]["learning_rate"] == {
        "default": 3e-4,
        "description": "peak rate",
        "exclusiveMinimum": 0,
        "type": "number",
    }
    assert training["properties"]["tokens"] == {"description": "budget, tokens", "type": "integer"}
    assert schema["$defs"]["slot-mixer"]["anyOf"][0] == {"enum": ["attention", "serial"]}
    assert schema["properties"]["model"] == {"$ref": "#/$defs/slot-model", "description": "the model"}


def test_two_registries_of_one_slot_are_refused() -> None:
    other: Registry[Any] = Registry("mixer")

    class Both(Section):
        one: Annotated[MixerConfig, MIXERS]
        two: Annotated[MixerConfig, other]

    with pytest.raises(ValueError, match="two registries have the same slot name"):
        json_schema(Both)


def test_one_item_or_several() -> None:
    class Root(Section):
        items: OneOrMore[int] = Field((), description="one or several", max_length=2)

    assert Root.model_validate({"items": 3}).items == (3,)
    assert Root.model_validate({"items": [3, 4]}).items == (3, 4)
    validator = Draft202012Validator(json_schema(Root, whole=True))
    for table, valid in [({"items": 3}, True), ({"items": [3, 4]}, True), ({"items": "3"}, False), ({"items": [3, 4, 5]}, False)]:
        assert validator.is_valid(table) == valid
        if not valid:
            with pytest.raises(ValidationError):
                Root.model_validate(table)
