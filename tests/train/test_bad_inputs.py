"""What a person can get wrong: each ends with status 2 (or 1 once training runs), says where and what to do, and loses nothing."""

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.train.runs import losses, train, write_config
from titanarch.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad_inputs")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A run of 20 steps with checkpoints at 5, 10, 15, 20."""
    train(write_config(folder, "trained", folder / "cache"))
    return folder / "trained"


def refused(config: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What ``titanarch train`` says while it exits with 2."""
    capsys.readouterr()
    assert main(["train", "--config", str(config), *overrides]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--training.learning_rte", "1"], ["learning_rte", "unknown key"]),
        (["--optimizer.lrr", "1"], ["did you mean 'lr'"]),
        (["--training.steps", '"many"'], ["[training] steps", "integer"]),
        (["--model.n_heads", "5"], ["not a multiple of n_heads (5)"]),
        (["--model.layers", '["attention", "mamba3"]'], ["unknown mixer 'mamba3'", "did you mean 'mamba2'"]),
        (["--model.layers", '["gla"]', "--model.mixers.gla.backend", "fla"], ["backend 'fla' is for CUDA, and this is cpu"]),
        (["--model.layers", '["mamba2"]', "--model.mixers.mamba2.head_dim", "7"], ["do not make the inner width 64"]),
        (["--training.global_batch_size", "7", "--training.local_batch_size", "2"], ["training", "global_batch_size", "multiple of 2"]),
        (["--training.tokens", "100"], ["exactly one of steps, tokens and minutes"]),
        (["--parallelism.tensor_parallel_degree", "2"], ["tensor_parallel_degree", "does not divide the 1 processes"]),
        (["--parallelism.pipeline_parallel_degree", "2"], ["no pipeline parallelism"]),
        (["--parallelism.data_parallel_shard_degree", "3"], ["data_parallel_shard_degree", "number of processes, 1"]),
        (["--model.vocab_size", "100"], ["fewer than the tokenizer's 8192"]),
        (["--training.seq_len", "65"], ["start_augmentation (48)", "training.seq_len (65)"]),
        (
            ["--data.source.kind", "jsonl", "--data.source.paths", '["nowhere.jsonl"]', "--data.validation_fraction", "0.1"],
            ["nowhere.jsonl"],
        ),
        (["--data.source.kind", "jsonl", "--data.source.paths", '["a.jsonl"]'], ["[validation] enable", "data.validation_fraction"]),
        (["--lr_scheduler.warmup_steps", "20"], ["warmup_steps"]),
        (["--data.mode", "streamed", "--data.streams", "3"], ["[data] streams", "3 streams are no multiple of the 8 rows"]),
        (["--data.mode", "streamed", "--data.workers", "9"], ["[data] workers", "9 workers are more than the 8 streams of a rank"]),
        (["--checkpoint.keep_best_k", "1", "--validation.enable", "false"], ["[checkpoint] keep_best_k", "validation.enable = false"]),
        (["--checkpoint.keep_best_k", "1", "--checkpoint.interval", "7"], ["keep_best_k", "first meet at step 70"]),
        (["--profiling.enable_memory_snapshot", "true"], ["enable_memory_snapshot", "cpu"]),
    ],
)
def test_a_wrong_key_or_value_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: list[str]) -> None:
    config = write_config(folder, "refused", folder / "cache")
    message = refused(config, capsys, *overrides)
    for text in said:
        assert text in message
    assert not (folder / "refused" / "metrics.jsonl").exists()


def test_all_errors_of_a_file_come_with_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, "run", tmp_path / "cache")
    text = config.read_text().replace("steps = 20", 'steps = "20"\nlearning_rte = 1')
    config.write_text(text)
    message = refused(config, capsys)
    lines = text.split("\n")
    for key in ('steps = "20"', "learning_rte = 1"):
        assert f"run.toml:{lines.index(key) + 1}: [training]" in message


def jsonl_config(folder: Path, name: str) -> list[str]:
    return ["--data.source.kind", "jsonl", "--data.source.paths", json.dumps([str(folder / name)]), "--data.validation_fraction", "0.2"]


def test_a_truncated_file_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(json.dumps({"text": f"{i} some words " * 50}) + "\n" for i in range(200)).encode()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(rows)[:-200])
    message = refused(write_config(folder, "cut", folder / "cache"), capsys, *jsonl_config(tmp_path, "cut.jsonl.gz"))
    assert "cut.jsonl.gz" in message


def test_an_empty_corpus_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    message = refused(write_config(folder, "empty", folder / "cache"), capsys, *jsonl_config(tmp_path, "empty.jsonl"))
    assert "empty.jsonl" in message or "no document" in message


def test_a_start_that_failed_does_not_bind_the_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(folder, "second_try", folder / "cache")
    refused(config, capsys, *jsonl_config(tmp_path, "missing.jsonl"))
    assert main(["train", "--config", str(config), "--training.steps", "5"]) == 0


def test_a_half_written_checkpoint_is_skipped(folder: Path, trained: Path) -> None:
    shutil.copytree(trained, folder / "half")
    config = write_config(folder, "half", folder / "cache")
    (folder / "half" / "result.json").unlink()
    checkpoints = folder / "half" / "checkpoints"
    (checkpoints / "step-00000020" / "COMMITTED.json").unlink()
    damaged = max((checkpoints / "step-00000015").iterdir(), key=lambda file: file.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    done = train(config)
    assert "step-00000015" in done.stderr
    assert losses(folder / "half") == losses(trained)
    resumed = json.loads((folder / "half" / "result.json").read_text())
    assert resumed["losses"] == json.loads((trained / "result.json").read_text())["losses"]


def test_raising_the_steps_of_a_constant_schedule_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(folder, "longer", folder / "cache")
    constant = ["--lr_scheduler.kind", "constant"]
    assert main(["train", "--config", str(config), *constant, "--training.steps", "10"]) == 0
    assert main(["train", "--config", str(config), *constant, "--training.steps", "20"]) == 0
    whole = write_config(folder, "whole", folder / "cache")
    assert main(["train", "--config", str(whole), *constant, "--training.steps", "20"]) == 0
    assert losses(folder / "longer") == losses(folder / "whole")


def test_raising_the_steps_of_a_decaying_schedule_is_refused(folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(write_config(folder, "trained", folder / "cache"), capsys, "--training.steps", "30")
    assert "[training] steps" in message


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoints(folder: Path, trained: Path) -> None:
    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    small = folder / "small_disk"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "none", str(small)], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        config = write_config(folder, "small_disk", folder / "cache")
        done = train(config, "--checkpoint.interval", "2", "--checkpoint.keep_latest_k", "0", status=1)
        assert "No space left" in done.stderr or "full" in done.stderr
        committed = list((small / "checkpoints").glob("*/COMMITTED.json"))
        assert committed, "the checkpoints before the disk was full are still there"
        assert "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", str(small)], check=False)
