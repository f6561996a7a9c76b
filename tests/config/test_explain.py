"""Each kind of mistake, and the words and the place that the user is shown."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, model_validator

from tests.config.small_run import SmallRun
from titanarch.config.errors import ConfigError, Problem
from titanarch.config.load import load_config
from titanarch.config.section import ListOf, Section


def errors(tmp_path: Path, text: str, *overrides: str, schema: type[Section] = SmallRun) -> list[str]:
    """What the user is shown, without the folder."""
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides, schema)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


WHOLE = "model = 'decoder'\ntraining.steps = 10\n"  # two lines


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        # unknown keys
        ("training.learning_rte = 1.0", "[training] learning_rte: unknown key; did you mean 'learning_rate'?"),
        ("job.steps = 1", "[job] steps: unknown key; did you mean 'training.steps'?"),
        ("job.zzz = 1", "[job] zzz: unknown key; allowed: comment, config_version, dump_folder"),
        ("steps = 1", "steps: unknown key; did you mean 'training.steps'?"),
        ("trainning.x = 1", "trainning: unknown table; did you mean 'training'?"),
        ("learnin_rate = 1", "learnin_rate: unknown key; allowed: data, experimental, job, metrics, model, training"),
        ("metrics.inner.widht = 1", "[metrics.inner] widht: unknown key; did you mean 'width'?"),
        ("metrics.width = 1", "[metrics] width: unknown key; did you mean 'metrics.inner.width'?"),
        ("data.sources = [{ path = 'x', wieght = 1.0 }]", "[data.sources[0]] wieght: unknown key; did you mean 'weight'?"),
        ("data.path = 'x'", "[data] path: unknown key; allowed: sources"),
        # wrong types
        ("training.learning_rate = 'a'", "[training] learning_rate: wants a number, got the string 'a'"),
        ("training.learning_rate = '1e-3'", "[training] learning_rate: wants a number, got the string '1e-3'; write 1e-3, without quotes"),
        ("training.tokens = 1e9", "[training] tokens: wants an integer, got the number 1000000000.0; write 1000000000"),
        ("training.tokens = 1.5", "[training] tokens: wants an integer, got the number 1.5"),
        ("training.tokens = true", "[training] tokens: wants an integer, got the boolean true"),
        ("training.deterministic = 1", "[training] deterministic: wants true or false, got the integer 1"),
        (
            "training.deterministic = 'True'",
            "[training] deterministic: wants true or false, got the string 'True'; write true, without quotes",
        ),
        ("job.comment = 2024-01-02", "[job] comment: wants a string, got the date or time 2024-01-02"),
        ("job.comment = ['a']", '[job] comment: wants a string, got the array ["a"]'),
        ("metrics = 3", "metrics: wants a table, got the integer 3"),
        ("data.sources = { path = 'x' }", '[data] sources: wants an array, got the table { path = "x" }'),
        ("data.sources = ['x']", "[data] sources[0]: wants a table, got the string 'x'"),
        ("training.betas = [0.9, 'x']", "[training] betas[1]: wants a number, got the string 'x'"),
        ("training.betas = [0.9]", "[training] betas: needs 2 items or more, got the array [0.9]"),
        ("training.betas = [0.9, 0.9, 0.9]", "[training] betas: takes 2 items or fewer, got the array [0.9, 0.9, 0.9]"),
        # choices
        ("training.warmup = 'autp'", "[training] warmup: wants an integer, 'auto' or 'none', got the string 'autp'; did you mean 'auto'?"),
        ("training.warmup = 'zzz'", "[training] warmup: wants an integer, 'auto' or 'none', got the string 'zzz'"),
        # limits
        ("training.learning_rate = 0.0", "[training] learning_rate: must be > 0, got the number 0.0"),
        # validators
        ("training.warmup = 11", "training: warmup 11 is longer than steps 10; lower it"),
    ],
)
def test_one_wrong_line(tmp_path: Path, line: str, shown: str) -> None:
    number = 2 if line.startswith("training.warmup = 11") else 3  # a validator's error stands where its table begins
    assert errors(tmp_path, WHOLE + line + "\n") == [f"run.toml:{number}: {shown}"]


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("name = 'decodr'", "1: model: unknown model 'decodr'; did you mean 'decoder'?"),
        ("dim = 3", "1: model: wants the name of a known model (decoder, hnet) or a table with 'name', got the table { dim = 3 }"),
        ("name = 'decoder'\nrelative = 'alibj'", "3: [model] relative: unknown position 'alibj'; did you mean 'alibi'?"),
        ("name = 'decoder'\nrelative = ['alibi', 'alibj']", "3: [model] relative[1]: unknown position 'alibj'; did you mean 'alibi'?"),
        (
            "name = 'decoder'\nrelative = 3",
            "3: [model] relative: wants the name of a known position (alibi, learned, rotary) or a table with 'kind' or an array, "
            "got the integer 3",
        ),
        (
            "name = 'decoder'\nrelative = 'learned'",
            "3: [model.relative] max_length: missing, and has no default; it is: rows of the table, tokens",
        ),
        (
            "name = 'decoder'\n[model.relative]\nkind = 'rotary'\n\nteta = 1.0",
            "6: [model.relative] teta: unknown key; did you mean 'theta'?",
        ),
        ("name = 'decoder'\nrelative = { kind = 'rotary', theta = 'x' }", "3: [model.relative] theta: wants a number, got the string 'x'"),
        ("name = 'decoder'\ntheta = 1.0\nrelative = 'rotary'", "3: [model] theta: unknown key; did you mean 'model.relative.theta'?"),
        (
            "name = 'decoder'\n[model.relative]\nkind = 'rotary'\n[model.relative.scaling]\nfaktor = 1.0",
            "6: [model.relative.scaling] faktor: unknown key; did you mean 'factor'?",
        ),
        ("name = 'decoder'\nlayers = []", "3: [model] layers: needs 1 item or more, got the array []"),
        ("name = 'decoder'\nlayers = [\n'a',\n2]", "5: [model] layers[1]: wants a string, got the integer 2"),
        (
            "name = 'decoder'\n[model.mixers.attention]\nn_head = 2",
            "4: [model.mixers.attention] n_head: unknown key; did you mean 'n_heads'?",
        ),
        (
            "name = 'decoder'\n[model.mixers.attention]\nn_heads = 65",
            "4: [model.mixers.attention] n_heads: must be <= 64, got the integer 65",
        ),
        (
            "name = 'decoder'\n[model.mixers.top]\nkind = 'serial'\nfirst = { kind = 'attention', n_hed = 1 }",
            "5: [model.mixers.top.first] n_hed: unknown key; did you mean 'n_heads'?",
        ),
        (
            "name = 'decoder'\n[model.mixers]\nnone = 3",
            "4: [model.mixers] none: wants the name of a known mixer (attention, serial) or a table with 'kind', got the integer 3",
        ),
        # an array of one, given as its item
        (
            "name = 'decoder'\n[model.mixers.attention]\nposition = { kind = 'rotary', teta = 1.0 }",
            "4: [model.mixers.attention.position] teta: unknown key; did you mean 'theta'?",
        ),
        (
            "name = 'decoder'\n[model.mixers.attention]\nposition = 'rotari'",
            "4: [model.mixers.attention] position: unknown position 'rotari'; did you mean 'rotary'?",
        ),
        # a mistake that a validator copies to every mixer is shown once
        ("name = 'decoder'\nposition = 'alibj'", "3: [model] position: unknown position 'alibj'; did you mean 'alibi'?"),
        ("name = 'decoder'\nposition = { kind = 'rotary', theta = 'x' }", "3: [model.position] theta: wants a number, got the string 'x'"),
        ("name = 'decoder'\nposition = { kind = 'rotary', teta = 1.0 }", "3: [model.position] teta: unknown key; did you mean 'theta'?"),
        (
            "name = 'decoder'\nposition = 'learned'",
            "3: [model.position] max_length: missing, and has no default; it is: rows of the table, tokens",
        ),
        ("name = 'hnet'\ndim = 3", "3: [model] dim: unknown key; allowed: name, stages"),
    ],
)
def test_one_wrong_component(tmp_path: Path, model: str, shown: str) -> None:
    assert errors(tmp_path, f"[model]\n{model}\n[training]\nsteps = 1\n") == [f"run.toml:{shown}"]


def test_missing_tables_and_keys_stand_where_they_belong(tmp_path: Path) -> None:
    assert errors(tmp_path, "\n[training]\n", "--training.tokens=1") == [
        "run.toml: model: missing, and has no default; it is: the model",
        "run.toml:2: [training] steps: missing, and has no default; it is: optimizer steps",
    ]
    assert errors(tmp_path, "model = 'decoder'\n", "--training.tokens=1") == [
        "run.toml: [training] steps: missing, and has no default; it is: optimizer steps"
    ]


def test_all_errors_of_all_files_in_the_order_of_reading(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("[job]\ndump_foldr = 'x'\ncomment = 1\n")
    text = "extends = 'base.toml'\nmodel = 'decoder'\n[training]\nsteps = 0\nlearning_rate = true\n"
    assert errors(tmp_path, text, "--training.tokns", "4", "--training.deterministic=False", "--job.comment=5") == [
        "base.toml:2: [job] dump_foldr: unknown key; did you mean 'dump_folder'?",
        "run.toml:4: [training] steps: must be > 0, got the integer 0",
        "run.toml:5: [training] learning_rate: wants a number, got the boolean true",
        "command line: [job] comment: wants a string, got the integer 5; write --job.comment='\"5\"'",
        "command line: [training] deterministic: wants true or false, got the string 'False'; write false",
        "command line: [training] tokns: unknown key; did you mean 'tokens'?",
    ]


def test_the_problem_holds_file_line_and_key(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(WHOLE + "training.stepz = 3\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, [], SmallRun)
    assert caught.value.problems == (Problem("unknown key; did you mean 'steps'?", key="training.stepz", file=str(file), line=3),)


class Limits(Section):
    even: int = Field(2, description="even", ge=2, multiple_of=2)
    text: str = Field("xy", description="text", pattern="^x")
    short: str = Field("", description="short", min_length=2, max_length=3)
    finite: float = Field(0.0, description="finite", allow_inf_nan=False)
    few: ListOf[int] = Field((), description="few", max_length=1)
    below: float = Field(0.0, description="below", lt=0.5)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("even = 0", "even: must be >= 2, got the integer 0"),
        ("even = 3", "even: must be a multiple of 2, got the integer 3"),
        ("text = 'a'", "text: must match the pattern ^x, got the string 'a'"),
        ("short = 'a'", "short: needs 2 characters or more, got the string 'a'"),
        ("short = 'abcd'", "short: takes 3 characters or fewer, got the string 'abcd'"),
        ("finite = nan", "finite: must be finite, got the number nan"),
        ("few = [1, 2]", "few: takes 1 item or fewer, got the array [1, 2]"),
        ("below = 0.5", "below: must be < 0.5, got the number 0.5"),
    ],
)
def test_limits_in_words(tmp_path: Path, line: str, shown: str) -> None:
    assert errors(tmp_path, line, schema=Limits) == [f"run.toml:1: {shown}"]


class Raises(Section):
    """A validator that raises ConfigError, which pydantic does not catch."""

    a: int = Field(1, description="a")

    @model_validator(mode="after")
    def _refuse(self) -> Any:
        raise ConfigError(Problem("too small", key="inner.a"))


def test_a_validators_config_error_is_given_its_place(tmp_path: Path) -> None:
    class Root(Section):
        inner: Raises = Field(Raises.model_construct(a=1), description="inner")

    assert errors(tmp_path, "\n[inner]\na = 2\n", schema=Root) == ["run.toml:3: [inner] a: too small"]
