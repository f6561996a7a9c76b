"""Whole runs: the layout does not change a run, and nothing is lost when it is killed."""

import json
import random
import re
from pathlib import Path

import pytest

from tests.train.runs import losses, rows, train, train_and_kill, write_config
from titanarch.checkpoint.marker import MARKER
from titanarch.data.ledger_check import check_ledger
from titanarch.data.ledger_files import read_ledger


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    """20 steps in one go on one process."""
    train(write_config(folder, "undisturbed", folder / "cache"))
    return folder / "undisturbed"


def test_a_run_leaves_what_the_design_says(undisturbed: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    assert {"config.toml", "configs", "metrics.jsonl", "checkpoints", "result.json", "identity.json"} <= names
    result = json.loads((undisturbed / "result.json").read_text())
    assert result["step"] == 20
    assert result["tokens"] == 20 * 8 * 32
    assert sorted(losses(undisturbed)) == list(range(1, 21))
    assert [row["step"] for row in rows(undisturbed) if "validation_loss" in row] == [10, 20]
    measured = {row["step"]: row["validation_loss"] for row in rows(undisturbed) if "validation_loss" in row}
    assert result["losses"]["validation"] == pytest.approx(measured[20])
    markers = [json.loads(path.read_text()) for path in sorted(undisturbed.glob("checkpoints/*/COMMITTED.json"))]
    assert {marker["step"]: marker["validation_loss"] for marker in markers} == {5: None, 15: None, **measured}
    saves = [row for row in rows(undisturbed) if "checkpoint_stall_seconds" in row]
    assert [row["step"] for row in saves] == [5, 10, 15, 20]
    assert saves[-1]["checkpoint_stall_seconds"] > saves[-1]["checkpoint_upload_seconds"] > 0  # the last save is waited for


def test_a_killed_run_resumes_to_bitwise_the_same_losses(folder: Path, undisturbed: Path) -> None:
    config = write_config(folder, "killed", folder / "cache")
    train_and_kill(config, folder / "killed", 11)
    train(config)
    assert losses(folder / "killed") == losses(undisturbed)
    assert (folder / "killed" / "configs" / "start-2.toml").exists()
    finished = json.loads((folder / "killed" / "result.json").read_text())
    assert finished["losses"] == json.loads((undisturbed / "result.json").read_text())["losses"]


@pytest.mark.parametrize(("n_processes", "overrides"), [(2, []), (4, ["--parallelism.data_parallel_replicate_degree", "2"])])
def test_the_number_of_processes_does_not_change_the_losses(
    folder: Path, undisturbed: Path, n_processes: int, overrides: list[str]
) -> None:
    name = f"processes_{n_processes}"
    train(write_config(folder, name, folder / "cache"), *overrides, n_processes=n_processes)
    expected, found = losses(undisturbed), losses(folder / name)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-6), f"step {step}"


def test_micro_batches_and_workers_do_not_change_the_losses(folder: Path, undisturbed: Path) -> None:
    config = write_config(folder, "micro", folder / "cache")
    train(config, "--training.local_batch_size", "2", "--data.workers", "2", "--activation_checkpoint.mode", "full")
    for step, loss in losses(undisturbed).items():
        assert losses(folder / "micro")[step] == pytest.approx(loss, rel=1e-6), f"step {step}"


def test_another_identity_in_the_same_folder_is_refused(folder: Path, undisturbed: Path) -> None:
    config = write_config(folder, "undisturbed", folder / "cache")
    before = (undisturbed / "metrics.jsonl").read_bytes()
    done = train(config, "--optimizer.lr", "5e-4", "--model.d_model", "64", status=2)
    assert "optimizer.lr" in done.stderr or "[optimizer] lr" in done.stderr
    assert "d_model" in done.stderr
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_says_so_and_trains_no_further(undisturbed: Path, folder: Path) -> None:
    before = losses(undisturbed)
    train(write_config(folder, "undisturbed", folder / "cache"))
    assert losses(undisturbed) == before


def test_a_run_ends_with_the_source_that_ends_it(folder: Path) -> None:
    """Half of the rows are those of a source that has one pass; started again, the run has nothing left to do."""
    sources = []
    for name, n_words in (("long", 9000), ("short", 1500)):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": "one two three four " * (n_words // 4)}) + "\n")
        at_end = "stop" if name == "short" else "repeat"
        sources.append(
            f'{{source = {{kind = "jsonl", paths = ["{folder}/{name}.jsonl"]}}, name = "{name}", weight = 1, at_end = "{at_end}"}}'
        )
    overrides = ["--data.source", f'{{kind = "mixture", sources = [{", ".join(sources)}]}}', "--metrics.sinks", '["jsonl", "progress"]']
    overrides += [
        "--data.validation",
        f'{{kind = "jsonl", paths = ["{folder}/short.jsonl"]}}',
        "--data.limit_documents",
        "0",
        "--data.packing",
        "best_fit",
        "--evaluation.enable",
        "false",
    ]
    config = write_config(folder, "mixture", folder / "cache")
    shown = train(config, *overrides)
    result = json.loads((folder / "mixture" / "result.json").read_text())
    last = [row for row in rows(folder / "mixture") if "epoch/short" in row][-1]
    n_rows = round(result["step"] * 8 / 2 / last["epoch/short"])  # of a pass over the short source
    assert result["step"] == 2 * n_rows // 8 < 20
    assert f"the run ends before step {result['step'] + 1}: the source short has ended: its {n_rows} rows" in shown.stdout + shown.stderr
    assert last["epoch/long"] < last["epoch/short"] <= 1
    train(config, *overrides)
    again = json.loads((folder / "mixture" / "result.json").read_text())
    assert (again["step"], again["losses"]) == (result["step"], result["losses"])


def test_streams_end_a_run_where_their_source_does(folder: Path) -> None:
    """All processes at the same step and with status 0, though only one of them reads the row that is not there; and after a kill."""
    draw, sources = random.Random(2), []
    for name, n_documents in (("endless", 200), ("ending", 100)):
        texts = ["one two three four " * draw.randint(2, 20) for _ in range(n_documents)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        source = f'{{kind = "jsonl", paths = ["{folder}/{name}.jsonl"]}}'
        sources.append(f'{{source = {source}, name = "{name}", weight = 1, at_end = "{"stop" if name == "ending" else "repeat"}"}}')
    overrides = ["--data.source", f'{{kind = "mixture", sources = [{", ".join(sources)}]}}', "--metrics.sinks", '["jsonl", "progress"]']
    overrides += ["--data.mode", "streamed", "--data.limit_documents", "0", "--data.streams", "16", "--training.steps", "1000"]
    overrides += ["--validation.enable", "false", "--evaluation.enable", "false", "--lr_scheduler.kind", "constant"]
    overrides += ["--data.allow_repeat", "true", "--checkpoint.interval", "4"]
    train(write_config(folder, "alone", folder / "cache"), *overrides)
    expected, killed = losses(folder / "alone"), write_config(folder, "killed at an end", folder / "cache")
    last = json.loads((folder / "alone" / "result.json").read_text())["step"]
    assert list(expected) == list(range(1, last + 1))
    train_and_kill(killed, folder / "killed at an end", draw.randint(3, 9), *overrides)
    shown = train(killed, *overrides, "--training.local_batch_size", "2", n_processes=2)
    assert losses(folder / "killed at an end") == pytest.approx(expected, rel=1e-5)
    assert json.loads((folder / "killed at an end" / "result.json").read_text())["step"] == last
    assert re.search(rf"the run ends before step {last + 1}: the source ending has ended: row \d+ of", shown.stdout + shown.stderr)
    assert (folder / "killed at an end" / "checkpoints" / f"step-{last:08d}" / MARKER).is_file()
    train(killed, *overrides)
    assert losses(folder / "killed at an end").keys() == expected.keys(), "there is nothing left to train"


def test_many_epochs_want_leave(folder: Path) -> None:
    text = folder / "few.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {i}: " + "a few words more " * 20}) + "\n" for i in range(8)))
    source = ["--data.source", f'{{ kind = "jsonl", paths = ["{text}"] }}', "--data.limit_documents", "0", "--validation.enable", "false"]
    config = write_config(folder, "repeating", folder / "cache")
    source += ["--metrics.sinks", '["jsonl", "progress"]']
    refused = train(config, *source, "--evaluation.enable", "false", status=2).stderr
    assert "epochs (" in refused
    assert "data.allow_repeat" in refused
    assert rows(folder / "repeating") == []
    allowed = train(config, *source, "--evaluation.enable", "false", "--data.allow_repeat", "true", n_processes=2)
    epochs = json.loads((folder / "repeating" / "result.json").read_text())["epochs"]
    assert epochs > 4
    assert f"epochs planned: {epochs:.2f} epochs (" in allowed.stderr + allowed.stdout


def test_phases_of_other_lengths_and_batches(folder: Path) -> None:
    """Rows get longer and batches smaller on the way; neither two processes nor a kill change the losses, or lose a row of a source."""
    phases = "--training.phases=[{steps = 4, seq_len = 8, global_batch_size = 16}, {steps = 3, seq_len = 16, global_batch_size = 8}]"
    texts = {"a": "one text and another, of some words " * 9, "b": "a few lines\n" * 20, "c": "and something else to learn from " * 60}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    parts = [f'{{source = {{kind = "text", paths = ["{folder / name}.txt"]}}, name = "{name}", weight = 1.0}}' for name in texts]
    data = (f'--data.source={{kind = "mixture", sources = [{", ".join(parts)}]}}', "--data.packing=best_fit", "--data.limit_documents=0")
    sizes = ("--training.global_batch_size=6", "--training.steps=12", "--checkpoint.interval=2", "--data.allow_repeat=true")
    options = (phases, *data, *sizes, "--data.ledger=true", "--validation.enable=false", "--evaluation.enable=false")
    train(write_config(folder, "phases", folder / "cache"), *options)
    expected = losses(folder / "phases")
    tokens = [row["tokens"] for row in rows(folder / "phases") if "loss" in row]
    assert tokens == [*range(128, 7 * 128 + 1, 128), *range(7 * 128 + 192, 7 * 128 + 5 * 192 + 1, 192)]
    assert json.loads((folder / "phases" / "result.json").read_text())["tokens"] == tokens[-1]
    killed = write_config(folder, "killed in a phase", folder / "cache")
    train_and_kill(killed, folder / "killed in a phase", 5, *options)
    train(killed, *options, n_processes=2)
    assert losses(folder / "killed in a phase") == pytest.approx(expected, rel=1e-5)
    report = check_ledger(read_ledger(folder / "killed in a phase"))
    assert (report.problems, report.n_steps, report.n_rows) == ((), 12, 4 * 16 + 3 * 8 + 5 * 6)
    assert report.passes[0].startswith("a, epoch 0: ")
    assert any(line.startswith("a, epoch 1: ") for line in report.passes), "a later pass means that all of the one before was used"


def test_streams_move_between_processes_where_the_batch_changes(folder: Path) -> None:
    """One process, and two that are killed and go on: bitwise the same rows at each step, of streams that both have in turn."""
    phases = "[{steps = 4, seq_len = 8, global_batch_size = 4}, {steps = 3, seq_len = 16, global_batch_size = 12}]"
    draw, sources = random.Random(3), []
    for name in ("stopping", "dropped"):
        texts = [" ".join(draw.choices(["one", "two", "three", "four"], k=draw.randint(2, 40))) for _ in range(200)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        source = f'{{kind = "jsonl", paths = ["{folder}/{name}.jsonl"]}}'
        sources.append(f'{{source = {source}, name = "{name}", weight = 1, at_end = "{"stop" if name == "stopping" else "drop"}"}}')
    options = [f"--training.phases={phases}", "--training.global_batch_size=8", "--training.steps=11", "--checkpoint.interval=2"]
    options += [f'--data.source={{kind = "mixture", sources = [{", ".join(sources)}]}}', "--data.mode=streamed", "--data.ledger=true"]
    options += ["--data.limit_documents=0", "--validation.enable=false", "--evaluation.enable=false"]
    train(write_config(folder, "one has all streams", folder / "cache"), *options)
    two = write_config(folder, "two move streams", folder / "cache")
    train_and_kill(two, folder / "two move streams", 5, *options, n_processes=2)
    train(two, *options, n_processes=2)
    one, other = (read_ledger(folder / name) for name in ("one has all streams", "two move streams"))
    assert sorted(one.steps) == sorted(other.steps) == list(range(1, 12))
    for step, rows_of_step in one.steps.items():
        assert rows_of_step.rows_NI.tolist() == other.steps[step].rows_NI.tolist(), f"step {step}"
    assert (check_ledger(other).problems, len(other.starts)) == ((), 2)
    assert losses(folder / "two move streams") == pytest.approx(losses(folder / "one has all streams"), rel=1e-5)
