"""Written text against the TOML parser of the standard library, and against the loader."""

import sys
from datetime import date, datetime, time, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from tests.config.small_run import Attention, Decoder, Rotary, SmallRun, Training
from titanarch.config.dump import dump_toml, to_table, toml_value
from titanarch.config.load import load_config
from titanarch.config.section import Section

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Anything(Section):
    values: dict[str, Any] = Field(description="whatever TOML can hold")


scalars = (
    st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.dates()
    | st.times()
    | st.datetimes()
    | st.datetimes(timezones=st.just(timezone.utc))
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=25)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(), values, max_size=5))
def test_any_table_is_read_back(table: dict[str, Any]) -> None:
    assert tomllib.loads(dump_toml(Anything(values=table))) == {"values": table}


@pytest.mark.parametrize(
    "value", [1, True, 0.1, 1e-5, 1e22, float("inf"), "\x00\x1f\x7f\u0085\"\\'''\r\n", date(1, 2, 3), time(1, 2), datetime(1, 2, 3)]
)
def test_types_are_kept(value: Any) -> None:
    read = tomllib.loads(f"key = {toml_value(value)}")["key"]
    assert read == value
    assert type(read) is type(value)


TABLE: dict[str, Any] = {
    "model": {
        "name": "decoder",
        "layers": ["attention", "top"],
        "relative": [{"kind": "rotary", "scaling": {"factor": 2.0}}, "alibi"],
        "mixers": {"top": {"kind": "serial", "first": {"kind": "attention", "position": "alibi"}}, "attention": {"n_heads": 2}},
    },
    "training": {"steps": 10, "learning_rate": 1e-5, "warmup": 3},
    "job": {"comment": 'a "b"\n\\ é'},
    "data": {"sources": [{"path": "x"}, {"path": "y", "weight": 2.0}]},
    "metrics": {"sinks": ["console"]},
    "experimental": {"custom_import": ["json", "math"]},
}


@pytest.mark.parametrize("table", [TABLE, {"model": "hnet", "training": {"steps": 1}}])
def test_a_dumped_configuration_loads_to_an_equal_one(table: dict[str, Any], tmp_path: Path) -> None:
    config = SmallRun.model_validate(table)
    file = tmp_path / "config.toml"
    file.write_text(dump_toml(config))
    again = load_config(file, [], SmallRun).config
    assert again == config
    assert dump_toml(again) == file.read_text()


def test_the_text_has_the_order_of_the_schema_and_its_notes() -> None:
    config = SmallRun.model_validate(TABLE | {"model": "decoder", "data": {}})
    assert dump_toml(config, notes={"training.steps": "run.toml:3", "job.comment": "default"}) == (
        "[job]\n"
        'dump_folder = "outputs"\n'
        'comment = "a \\"b\\"\\n\\\\ é"  # default\n'
        "config_version = 1\n"
        "\n[model]\n"
        'name = "decoder"\n'
        "dim = 64\n"
        'layers = ["attention"]\n'
        "position = []\n"
        "\n[model.relative]\n"
        'kind = "alibi"\n'
        "slope = 1.0\n"
        "\n[model.mixers]\n"
        "\n[training]\n"
        "steps = 10  # run.toml:3\n"
        "learning_rate = 1e-05\n"
        "warmup = 3\n"
        "deterministic = false\n"
        "betas = [0.9, 0.95]\n"
        "\n[data]\n"
        "sources = []\n"
        "\n[metrics]\n"
        "log_freq = 10\n"
        "\n[[metrics.sinks]]\n"
        'kind = "console"\n'
        "\n[metrics.inner]\n"
        "width = 80\n"
        "\n[experimental]\n"
        'custom_import = ["json", "math"]\n'
    )


def test_a_long_array_has_an_item_a_line() -> None:
    text = dump_toml(Decoder.Config(layers=("attention",) * 20))
    assert '\nlayers = [\n    "attention",\n    "attention",\n' in text
    assert tomllib.loads(text)["layers"] == ["attention"] * 20


def test_the_plain_table_holds_what_the_components_hold() -> None:
    config = Attention.Config(position=(Rotary.Config(theta=2.0),))
    assert to_table(config) == {
        "kind": "attention",
        "n_heads": 8,
        "position": [{"kind": "rotary", "theta": 2.0, "scaling": {"factor": 1.0}}],
    }


def test_none_is_left_out_only_where_it_is_the_default() -> None:
    class Optional(Section):
        a: int | None = Field(3, description="a")

    assert "tokens" not in dump_toml(Training(steps=1))
    with pytest.raises(ValueError, match="a is None, which TOML cannot write"):
        dump_toml(Optional(a=None))


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="no type for"):
        dump_toml(Anything(values={"a": {1, 2}}))
