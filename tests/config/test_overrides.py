from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titanarch.config.errors import ConfigError
from titanarch.config.overrides import override_trees, parse_command_line, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1", -1),
        ("1e-5", 1e-5),
        ("true", True),
        ("True", "True"),
        ("alibi", "alibi"),
        ('"3"', "3"),
        ("[1, 2]", [1, 2]),
        ('{kind = "rotary", theta = 5e5}', {"kind": "rotary", "theta": 5e5}),
        ("2024-01-02", date(2024, 1, 2)),
        ("", ""),
        ("a = b", "a = b"),
        # what follows a value must not be lost
        ("1 # 2", "1 # 2"),
        ("1, 2", "1, 2"),
        ("1,", "1,"),
        ("1\nother = 2", "1\nother = 2"),
        ("https://a.b/c?d=e#f", "https://a.b/c?d=e#f"),
    ],
)
def test_values_are_toml_or_the_text_itself(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@given(st.text())
def test_any_text_is_a_value(text: str) -> None:
    value = parse_value(text)
    assert value == text or not isinstance(value, str) or text.strip(" \t")[0] in "\"'"


def tables(*arguments: str) -> list[Any]:
    return [tree.plain() for tree in override_trees(arguments)]


def test_forms_of_overrides() -> None:
    assert tables("--a.b", "1", "--a.c=x=y", "--flag", "--n", "-3", '--d."e.f"=[]', "--last") == [
        {"a": {"b": 1}},
        {"a": {"c": "x=y"}},
        {"flag": True},
        {"n": -3},
        {"d": {"e.f": []}},
        {"last": True},
    ]


def test_every_wrong_argument_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        override_trees(["stray", "--a..b=1", "--ok=1", "--", "--a b"])
    assert [str(problem) for problem in caught.value.problems] == [
        "command line: 'stray' belongs to no option; write --section.key value",
        "command line: '--a..b' is no key; write --section.key value",
        "command line: '--' belongs to no option; write --section.key value",
        "command line: '--a b' is no key; write --section.key value",
    ]


@pytest.mark.parametrize(
    "option", [("--config", "a.toml"), ("--config=a.toml",), ("--job.config_file", "a.toml"), ("--job.config_file=a.toml",)]
)
def test_the_file_stands_anywhere(option: tuple[str, ...]) -> None:
    path, overrides = parse_command_line(["--x.flag", *option, "--x.y", "1", "--x.z=--2"])
    assert str(path) == "a.toml"
    assert overrides == ["--x.flag", "--x.y=1", "--x.z=--2"]
    assert tables(*overrides) == [{"x": {"flag": True}}, {"x": {"y": 1}}, {"x": {"z": "--2"}}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no configuration file; give one"),
        (["--a.b", "1"], "no configuration file; give one"),
        (["--config"], "--config needs a file"),
        (["--config", "--a.b"], "--config needs a file"),
        (["--config="], "--config needs a file"),
        (["--config", "a.toml", "--job.config_file", "b.toml"], "got a.toml, b.toml; to combine files use 'extends'"),
        (["a.toml"], "'a.toml' belongs to no option"),
    ],
)
def test_wrong_command_lines(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match="command line: ") as caught:
        parse_command_line(arguments)
    assert message in str(caught.value)


def test_the_same_file_twice_is_no_contradiction() -> None:
    assert str(parse_command_line(["--config", "a.toml", "--config=a.toml"])[0]) == "a.toml"
