"""``titanarch new``: what it writes works as it is."""

import shlex
from pathlib import Path

import pytest

from tests.user_code import losses_of_three_steps, python
from titanarch.cli.main import main
from titanarch.cli.new import written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixer and a channel mixer, begun."""
    folder = tmp_path_factory.mktemp("begun") / "mine"
    assert main(["new", "mixer", "my_average", "--folder", str(folder)]) == 0
    assert main(["new", "channel", "my_units", "--folder", str(folder)]) == 0
    return folder


def test_the_files(folder: Path) -> None:
    names = ["my_average.py", "my_average.toml", "my_units.py", "my_units.toml"]
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted([*names, "test_my_average.py", "test_my_units.py"])
    text = "".join(path.read_text() for path in folder.iterdir() if path.is_file())
    assert "class MyAverage(RecurrentMixer)" in text
    assert "class MyUnits(ChannelMixer)" in text
    assert not any(word in text for word in ("moving_average", "MovingAverage", "squared_relu", "SquaredRelu", "skeletons"))


def test_its_tests_pass(folder: Path) -> None:
    """All checks on one process and on two, of both, in one start."""
    ran = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_average.py", "test_my_units.py", folder=folder)
    assert ran.returncode == 0, ran.stdout
    assert "32 passed" in ran.stdout, ran.stdout  # 14 checks, processes and the formula, twice


def test_it_trains(folder: Path) -> None:
    """The channel mixer; tests/test_docs.py trains the mixer."""
    losses = losses_of_three_steps(folder, "my_units", evaluation__enable="false")
    assert losses[0] == pytest.approx(9.01 + 0.08, abs=0.1), "ln 8,192 and half the variance of the logits, 384 x 0.02^2"
    assert losses[2] < losses[0]


@pytest.mark.parametrize(
    ("slot", "name", "message"),
    [
        ("mixer", "9lives", "'9lives' cannot be the name of a mixer; use lower-case letters"),
        ("mixer", "My", "'My' cannot be"),
        ("channel", "../up", "'../up' cannot be the name of a channel"),
        ("mixer", "class", "'class' cannot be"),
        ("mixer", "attention", "a mixer 'attention' comes with titanarch; choose another name, such as my_attention"),
        ("channel", "swiglu", "a channel mixer 'swiglu' comes with titanarch"),
        ("mixer", "json", "'json' is a Python module already"),
        ("mixer", "torch", "'torch' is a Python module already"),
        ("mixer", "linear", "'linear' would have a class Linear, a name that the file has for something else; try my_linear"),
        ("mixer", "mixer", "'mixer' would have a class MixerConfig"),
        ("channel", "f", "'f' would have a class F,"),
        ("mixer", "none", "'none' would have a class None"),
        ("mixer", "true", "'true' would have a class True"),
    ],
)
def test_a_bad_name_is_refused(slot: str, name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", slot, name, "--folder", str(tmp_path / "there")]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("slot", "example"), [("mixer", "moving_average"), ("channel", "squared_relu")])
def test_the_examples_own_name_may_be_a_part(slot: str, example: str) -> None:
    """Every name is that of another component, with as much more."""
    longer, plain = written(slot, f"my_{example}", Path()), written(slot, "plain_one", Path())
    class_name = "".join(map(str.capitalize, example.split("_")))
    for (name, text), other in zip(longer.items(), plain.values(), strict=True):
        assert text == other.replace("plain_one", f"my_{example}").replace("PlainOne", f"My{class_name}"), name


def test_commands_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my ideas"
    assert main(["new", "mixer", "mine", "--folder", str(folder)]) == 0
    _, _, *commands = capsys.readouterr().out.splitlines()
    written_in_toml = (folder / "mine.toml").read_text().splitlines()[2].removeprefix("# Command: ")
    for command in (*commands, written_in_toml):
        assert shlex.split(command)[0] == f"PYTHONPATH={folder}"
    assert shlex.split(commands[2])[-1] == shlex.split(written_in_toml)[-1] == f"{folder}/mine.toml"


@pytest.mark.parametrize("name", ["mine.py", "mine.toml", "test_mine.py"])
def test_nothing_is_overwritten(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text("precious")
    assert main(["new", "mixer", "mine", "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path / name} exists, and nothing is overwritten; choose another name or folder, or remove it\n"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "precious"}


def test_a_file_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["new", "mixer", "mine", "--folder", str(tmp_path / "file")]) == 2
    assert "choose another folder" in capsys.readouterr().err
