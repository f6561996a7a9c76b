"""``titanarch new``: what it writes works as it is."""

from pathlib import Path

import pytest

from tests.user_code import losses_of_three_steps, python
from titanarch.cli.main import main


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
    ],
)
def test_a_bad_name_is_refused(slot: str, name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", slot, name, "--folder", str(tmp_path / "there")]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert list(tmp_path.iterdir()) == []


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
