"""Techniques switched on by keys, in short whole runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.runs import losses, rows, write_config
from titanarch.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("techniques")


def run(folder: Path, name: str, *overrides: str, steps: int = 4, status: int = 0) -> Path:
    config = write_config(folder, name, folder / "cache")
    assert main(["train", "--config", str(config), "--training.steps", str(steps), "--lr_scheduler.kind", "constant", *overrides]) == status
    return folder / name


def result(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((path / "result.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    return run(folder, "plain")


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_low_precision_follows_fp32(folder: Path, plain: Path, dtype: str, tolerance: float) -> None:
    path = run(folder, dtype, "--training.mixed_precision_param", dtype)
    found, expected = losses(path), losses(plain)
    # float16 begins with a scale that may overflow: such steps are skipped, so only the first loss is comparable.
    assert found[1] == pytest.approx(expected[1], rel=tolerance)
    if dtype == "bfloat16":
        assert found == pytest.approx(expected, rel=tolerance)


def test_z_loss_is_logged_and_trained_on(folder: Path, plain: Path) -> None:
    path = run(folder, "z_loss", "--training.z_loss_weight", "0.01")
    logged = [row["z_loss"] for row in rows(path) if "loss" in row]
    # At first all logits are near 0, so log Z is near ln V.
    assert logged[0] == pytest.approx(0.01 * 9.0109**2, rel=0.02)
    assert losses(path)[1] == losses(plain)[1]
    assert losses(path)[4] != losses(plain)[4]


@pytest.mark.parametrize(
    "optimizer",
    [
        ["--optimizer.name", "Muon", "--optimizer.lr", "2e-2", "--optimizer.adamw_lr", "1e-2"],
        ["--optimizer.name", "SGD", "--optimizer.lr", "0.5", "--optimizer.momentum", "0.9"],
        ["--optimizer.name", "Adam", "--optimizer.lr", "1e-3"],
    ],
)
def test_optimizers_learn(folder: Path, optimizer: list[str]) -> None:
    found = losses(run(folder, f"optimizer_{optimizer[1]}", *optimizer, "--training.max_norm", "inf", steps=8))
    assert found[8] < found[1] - 0.1


@pytest.mark.parametrize("kind", ["linear", "wsd"])
def test_schedules_end_lower(folder: Path, kind: str) -> None:
    path = run(folder, f"schedule_{kind}", "--lr_scheduler.kind", kind, "--lr_scheduler.warmup_steps", "2", steps=8)
    lr = [row["lr"] for row in rows(path) if "lr" in row]
    assert lr[0] == pytest.approx(5e-4)
    assert max(lr) == pytest.approx(1e-3)
    assert lr[-1] < 1e-3


def test_a_token_budget_is_rounded_up_to_whole_steps(folder: Path) -> None:
    config = write_config(folder, "tokens", folder / "cache")
    config.write_text(config.read_text().replace("steps = 20", "tokens = 700"))
    assert main(["train", "--config", str(config), "--lr_scheduler.warmup_steps", "1"]) == 0
    assert result(folder / "tokens")["step"] == 3


def test_a_time_budget_ends_near_its_time_and_counts_earlier_starts(folder: Path) -> None:
    config = write_config(folder, "minutes", folder / "cache")
    text = config.read_text().replace("steps = 20", "minutes = 0.05").replace("warmup_steps = 3", "warmup_fraction = 0.1")
    config.write_text(text)
    assert main(["train", "--config", str(config)]) == 0
    first = result(folder / "minutes")
    assert 2.9 < first["train_seconds"] < 6
    assert main(["train", "--config", str(config)]) == 0
    assert result(folder / "minutes") == first


def test_a_step_that_is_not_finite_stops_the_run_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "stops", "--optimizer.lr", "1e30", steps=6, status=1)
    said = capsys.readouterr().err
    assert "the loss is" in said
    assert "optimizer.lr" in said


def test_a_step_that_is_not_finite_is_skipped_where_asked(folder: Path) -> None:
    path = run(folder, "skips", "--optimizer.lr", "1e30", "--bad_gradients.nonfinite", "skip", steps=6)
    assert result(path)["skipped_steps"] >= 1
    last = [row for row in rows(path) if "skipped_steps" in row][-1]
    assert last["skipped_steps"] == result(path)["skipped_steps"]


def test_a_drawn_seed_is_recorded_and_used_again(folder: Path) -> None:
    config = write_config(folder, "drawn", folder / "cache")
    config.write_text(config.read_text().replace("seed = 7", ""))
    constant = ["--lr_scheduler.kind", "constant"]
    assert main(["train", "--config", str(config), "--training.steps", "2", *constant]) == 0
    seed = json.loads((folder / "drawn" / "identity.json").read_text())["debug.seed"]
    assert main(["train", "--config", str(config), "--training.steps", "4", *constant]) == 0
    again = run(folder, "drawn_again", "--debug.seed", str(seed))
    assert losses(folder / "drawn") == losses(again)


def test_weights_of_another_run_start_one(folder: Path, plain: Path) -> None:
    start = ["--checkpoint.initial_load_path", str(plain / "checkpoints")]
    path = run(folder, "continued", *start)
    assert losses(path)[1] < losses(plain)[1] - 0.05
    other = run(folder, "new_head", *start, "--checkpoint.exclude_from_loading", '["model.head"]', steps=1)
    assert losses(other)[1] > losses(path)[1]


def test_streamed_text_resumes_to_the_same_losses(folder: Path, tmp_path: Path) -> None:
    for part in range(3):
        text = "\n".join(json.dumps({"text": f"document {part} {i}: " + f"the {i} of {part} and " * (5 + i % 7)}) for i in range(40))
        (tmp_path / f"part-{part}.jsonl").write_text(text + "\n")
    streamed = [
        *("--data.mode", "streamed", "--data.source.kind", "jsonl", "--data.source.paths", json.dumps([str(tmp_path / "part-*.jsonl")])),
        *(
            "--data.limit_documents",
            "0",
            "--data.validation_fraction",
            "0.1",
            "--validation.enable",
            "false",
            "--evaluation.lengths",
            "[16]",
        ),
    ]
    whole = run(folder, "streamed", *streamed, steps=8)
    run(folder, "streamed_twice", *streamed, steps=4)
    parts = run(folder, "streamed_twice", *streamed, steps=8)
    assert losses(parts) == losses(whole)


def test_a_profile_is_written_where_asked(folder: Path) -> None:
    path = run(folder, "profiled", "--profiling.enable_profiling", "true", "--profiling.profile_freq", "4", steps=4)
    assert list((path / "profile_traces").glob("step-*/rank0_trace.json.gz"))


TRACED = ["--compile.enable", "true", "--compile.backend", "aot_eager", "--activation_checkpoint.mode", "full"]


def test_a_compiled_and_checkpointed_run_goes_on_without_either(folder: Path, plain: Path) -> None:
    path = run(folder, "compiled", "--checkpoint.interval", "2", *TRACED, steps=2)
    assert run(folder, "compiled", "--checkpoint.interval", "2") == path
    assert losses(path) == pytest.approx(losses(plain), rel=1e-6)
    assert json.loads((path / "identity.json").read_text()) == json.loads((plain / "identity.json").read_text())


def test_float8_is_another_run_and_says_that_it_is_emulated(folder: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sinks = '["jsonl", "progress"]'
    path = run(folder, "float8", "--quantize.linear.float8.enable", "true", "--metrics.sinks", sinks, steps=2)
    assert "tensorwise is emulated on this cpu" in capsys.readouterr().err
    found = losses(path)
    assert found == pytest.approx({step: losses(plain)[step] for step in found}, rel=2e-2)
    assert found != {step: losses(plain)[step] for step in found}
    run(folder, "float8", steps=2, status=2)
    assert "[quantize.linear.float8] enable" in capsys.readouterr().err


def test_all_that_techniques_cannot_do_is_told_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--activation_checkpoint.mode", "memory_budget", "--quantize.linear.float8.enable", "true", "--model.channel.d_ff", "72"]
    run(folder, "wrong", *wrong, "--quantize.linear.float8.recipe_name", "rowwise",
        "--quantize.linear.float8.enable_fsdp_float8_all_gather", "true", status=2)  # fmt: skip
    said = capsys.readouterr().err
    assert "[activation_checkpoint] mode" in said
    assert "layers.1.channel.up 72 x 32" in said
    assert "[quantize.linear.float8] enable_fsdp_float8_all_gather" in said
    assert not (folder / "wrong").exists()
