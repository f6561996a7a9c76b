"""``titanarch config`` on a small root schema and on the configurations that ship, and the plumbing of the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

import titanarch.cli.config
from tests.config.small_run import SmallRun
from titanarch import __version__
from titanarch.cli.main import COMMANDS, main
from titanarch.config.dump import dump_toml, to_table
from titanarch.config.errors import ConfigError, Problem
from titanarch.config.identity import identity_hash
from titanarch.config.load import load_config
from titanarch.config.reference import reference_page
from titanarch.config.schema import json_schema
from titanarch.train.run_config import RunConfig

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "train_configs").rglob("*.toml"))

TEXT = """\
[model]
name = "decoder"
relative = "rotary"
position = "alibi"
[training]
steps = 10
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the small schema in the current folder; running it is refused on 3 processes."""

    def check_run(config: SmallRun, *, world_size: int, device_type: str) -> None:
        assert device_type in ("cpu", "cuda")
        if world_size == 3:
            raise ConfigError(Problem("10 does not divide by 3", key="training.steps"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(titanarch.cli.config, "RunConfig", SmallRun)
    monkeypatch.setattr(titanarch.cli.config, "check_run", check_run)
    monkeypatch.setattr(titanarch.cli.config, "device_type", lambda: "cpu")
    Path("run.toml").write_text(TEXT)
    return Path("run.toml")


def test_check_says_what_is_valid(small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["config", "check", "--config", "run.toml", "--training.steps", "20"]) == 0
    digest = identity_hash(load_config(small, ["--training.steps=20"], SmallRun).config)[:12]
    assert capsys.readouterr() == (f"configuration is valid: run.toml, 1 process on cpu (identity {digest})\n", "")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["config", "check", "--job.config_file=run.toml"]) == 0
    assert "run.toml, 4 processes on cpu" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("arguments", "world_size", "shown"),
    [
        (
            ["--config", "run.toml", "--training.stepz=1", "--job.comment", "1"],
            "1",
            "command line: [job] comment: wants a string, got the integer 1; write --job.comment='\"1\"'\n"
            "command line: [training] stepz: unknown key; did you mean 'steps'?\n",
        ),
        (["--config", "run.toml"], "3", "run.toml:6: [training] steps: 10 does not divide by 3\n"),
        (["--config", "run.toml"], "0", "WORLD_SIZE=0: the number of processes to check for is wanted, from 1\n"),
        ([], "1", "command line: no configuration file; give one, as in --config train_configs/debug.toml\n"),
        (["--config", "absent.toml"], "1", "absent.toml: cannot read the configuration: No such file or directory\n"),
    ],
)
def test_check_refuses_plainly_with_2(
    arguments: list[str], world_size: str, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world_size)
    assert main(["config", "check", *arguments]) == 2
    assert capsys.readouterr() == ("", shown)


def test_show_prints_what_loads_again(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "run.toml", "--job.comment", "two words", "--training.tokens=5"]
    assert main(["config", "show", *arguments]) == 0
    shown = capsys.readouterr().out
    config = load_config(small, ["--job.comment=two words", "--training.tokens=5"], SmallRun).config
    assert shown == dump_toml(config)
    Path("shown.toml").write_text(shown)
    assert load_config("shown.toml", [], SmallRun).config == config


@pytest.mark.usefixtures("small")
def test_show_tells_origins(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--origins", "--config", "run.toml", "--training.tokens=5", "--data.sources=[{path = 'x'}]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        'name = "decoder"  # run.toml:2',
        "dim = 64  # default",
        'kind = "rotary"  # run.toml:3',  # given as a bare name
        "theta = 10000.0  # default",
        "steps = 10  # run.toml:6",
        "tokens = 5  # command line",
        'path = "x"  # command line',
        "weight = 1.0  # default",
    ):
        assert line in lines
    # one item given for an array, and its copy in the attention, which no file has
    assert [line for line in lines if line.startswith('kind = "alibi"')] == ['kind = "alibi"  # run.toml:4', 'kind = "alibi"  # default']


@pytest.mark.usefixtures("small")
def test_schema_and_docs_are_those_of_the_root(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema(SmallRun)
    assert main(["config", "schema", "--whole"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema(SmallRun, whole=True)
    assert main(["config", "docs"]) == 0
    assert capsys.readouterr().out == reference_page(SmallRun)


@pytest.mark.parametrize("arguments", [[], ["confg"], ["config"], ["config", "shw"], ["config", "docs", "--config", "run.toml"]])
def test_wrong_commands_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: titanarch" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: titanarch {name}")


def test_help_and_version_import_no_torch() -> None:
    program = "import sys\nfrom titanarch.cli.main import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    for option, shown in (("--help", "config"), ("--version", __version__)):
        done = subprocess.run([sys.executable, "-c", program, option], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert shown in done.stdout


def test_a_reader_that_stops_early_is_no_error() -> None:
    program = (
        "import sys, types\n"
        "from titanarch.cli import main as cli\n"
        "def run(args):\n"
        "    print('x' * 1_000_000)\n"
        "    return 0\n"
        "sys.modules['long'] = types.SimpleNamespace(configure=lambda parser: None, run=run)\n"
        "cli.COMMANDS['long'] = cli.Command('long', 'prints')\n"
        "sys.exit(cli.main(['long']))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(ROOT / "train_configs")))
def test_shipped_configurations_load_and_are_what_their_dump_says(file: Path, tmp_path: Path) -> None:
    config = load_config(file, [], RunConfig).config
    again = tmp_path / "config.toml"
    again.write_text(dump_toml(config))
    assert load_config(again, [], RunConfig).config == config
    assert Draft202012Validator(json_schema(RunConfig, whole=True)).is_valid(to_table(config))


def test_the_real_schema_and_page_cover_every_section() -> None:
    Draft202012Validator.check_schema(json_schema(RunConfig))
    page = reference_page(RunConfig)
    for section in ("job", "training", "checkpoint", "metrics", "parallelism"):
        assert f"## `[{section}]`" in page
