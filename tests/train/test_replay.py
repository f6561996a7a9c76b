"""Replaying a step gives what was logged of it, and two runs part where they were made to."""

from pathlib import Path

import pytest

from tests.train.faults import faulty_forward
from tests.train.runs import rows, write_config
from titanarch.cli.main import main
from titanarch.models.language_model import CausalLanguageModel

OFF = ["--validation.enable", "false", "--evaluation.enable", "false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replay")


def run(folder: Path, name: str, *overrides: str, steps: int) -> Path:
    config = write_config(folder, name, folder / "cache")
    assert (
        main(["train", "--config", str(config), "--training.steps", str(steps), "--lr_scheduler.kind", "constant", *OFF, *overrides]) == 0
    )
    return folder / name


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    return run(folder, "plain", steps=8)


def replayed(path: Path, capsys: pytest.CaptureFixture[str], step: int, *options: str) -> tuple[dict[str, tuple[str, str]], str]:
    """Replayed and logged values by name, and all that was said."""
    capsys.readouterr()
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert main(["replay", str(path), "--step", str(step), *options]) == 0
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before, "nothing is written"
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    return {line[0]: (line[1], line[2]) for line in lines if line and line[0] in ("loss", "grad_norm")}, said


def test_a_replayed_step_is_the_logged_one(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = next(row for row in rows(plain) if row["step"] == 8)
    found, said = replayed(plain, capsys, 8)
    assert found["loss"] == (f"{row['loss']:.9g}",) * 2
    assert float(found["grad_norm"][0]) == pytest.approx(row["grad_norm"], rel=1e-6)  # by layer it is another order of sums
    assert "from the checkpoint of step 5: rows 56 to 63" in said
    norms = {line.split()[0]: float(line.split()[1]) for line in said.split("by layer\n")[1].splitlines()}
    assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(row["grad_norm"], rel=1e-6)
    first, said = replayed(plain, capsys, 2, "--local-batch-size", "4")
    assert "from the initial weights" in said
    assert float(first["loss"][0]) == pytest.approx(float(first["loss"][1]), rel=1e-6)
    low, _ = replayed(plain, capsys, 6, "--dtype", "bfloat16")
    assert low["loss"][0] != low["loss"][1]
    assert float(low["loss"][0]) == pytest.approx(float(low["loss"][1]), rel=1e-2)


def test_a_step_is_replayed_on_another_layout(plain: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two processes that share each layer make the step that one process made."""
    layout = ["--processes", "2", "--parallelism.tensor_parallel_degree", "2"]
    assert main(["replay", str(plain), "--step", "7", *layout]) == 0
    said = capfd.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    found = {line[0]: line[1:] for line in lines if line and line[0] in ("loss", "grad_norm")}
    (loss, logged), (norm, logged_norm) = found["loss"], found["grad_norm"]
    assert float(loss) == pytest.approx(float(logged), rel=1e-6)
    assert float(norm) == pytest.approx(float(logged_norm), rel=1e-4)
    assert "from the checkpoint of step 5: rows 48 to 55" in said


def test_a_damaged_checkpoint_is_passed_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run(folder, "damaged", "--checkpoint.interval", "3", steps=8)
    file = path / "checkpoints" / "step-00000006" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    found, said = replayed(path, capsys, 8)
    assert found["loss"][0] == found["loss"][1]
    assert "from the checkpoint of step 3: rows 56 to 63" in said


def test_a_step_after_a_roll_back_has_its_rows(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalLanguageModel, "forward", faulty_forward({56: "nan"}))  # the first row of step 8
    path = run(folder, "rolled", "--bad_gradients.nonfinite", "roll_back", "--checkpoint.last_save", "false", steps=8)
    found, said = replayed(path, capsys, 8)
    assert found["loss"][0] == found["loss"][1]
    assert "rows 80 to 87" in said
    found, said = replayed(path, capsys, 8, "--rolled-back")
    assert "rows 56 to 63" in said
    assert "in backward order: layers.1.channel.down" in said
    assert found["grad_norm"][0] == "nan"


def test_runs_part_at_the_module_that_differs(folder: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other run takes up all state after step 5, with another dropout in attention."""
    start = ["--checkpoint.initial_load_path", str(plain / "checkpoints/step-00000005"), "--checkpoint.initial_load_model_only", "false"]
    other = run(folder, "other", *start, "--model.mixers.attention.dropout", "0.2", steps=7)
    capsys.readouterr()
    assert main(["diff", str(plain), str(other)]) == 1
    said = capsys.readouterr().out
    assert "the logged losses part at step 6:" in said
    assert "the rows are the same" in said
    assert "no difference in 28 parameters before the step" in said
    assert "the first is layers.0.mixer.wo, by" in said


def test_runs_with_other_weights_part_there(folder: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Logged every third step only: which step it is comes from the replay."""
    other = run(folder, "rate", "--optimizer.lr", "2e-3", "--metrics.log_freq", "3", steps=3)
    sparse = run(folder, "sparse", "--metrics.log_freq", "3", steps=3)
    capsys.readouterr()
    assert main(["diff", str(sparse), str(other)]) == 1
    said = capsys.readouterr().out
    assert "the logged losses part at step 3:" in said
    assert "step 2, replayed" in said
    assert "parameters before the step differ; the first is embedding.weight" in said
    assert main(["diff", str(sparse), str(other), "--tolerance", "0.1"]) == 0
    assert main(["diff", str(plain), str(sparse), "--no-replay"]) == 1, "a mean over three steps is another number"


def test_a_step_that_cannot_be_replayed_is_refused(folder: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([str(folder / "nowhere"), "--step", "3"], "no config.toml"),
        ([str(plain), "--step", "0"], "numbered from 1"),
        ([str(plain), "--step", "3", "--processes", "0"], "--processes 0"),
        ([str(plain), "--step", "3", "--training.seq_len", "8"], "no option of replay"),
    ):
        assert main(["replay", *arguments]) == 2
        assert words in capsys.readouterr().err
