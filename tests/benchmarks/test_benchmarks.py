"""The benchmarks run, and measure what they say: both sides of each compute the same."""

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from titanarch.parallel.config import CommConfig
from titanarch.train.processes import Processes, start_processes, stop_processes
from titanarch.train.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
BENCHMARKS = str(ROOT / "benchmarks")
TINY = ["--model.n_layers=2", "--model.d_model=24", "--model.n_heads=6", "--training.seq_len=32", "--training.global_batch_size=4"]


def benchmark(name: str) -> ModuleType:
    """A module of benchmarks/, which import one another as scripts do."""
    if BENCHMARKS not in sys.path:
        sys.path.append(BENCHMARKS)
    return importlib.import_module(name)


@pytest.fixture
def processes() -> Iterator[Processes]:
    yield start_processes(CommConfig())
    stop_processes()


def test_the_extra_time_is_the_mean_difference_of_a_round() -> None:
    overhead, measure = benchmark("trainer_overhead"), benchmark("measure")
    rounds = [[measure.Sample(wall, 2 * wall) for wall in walls] for walls in ((5.0, 2.0, 4.0, 7.0), (6.0, 3.0, 3.0, 6.0))]
    comparison = measure.comparison_of("a", "b", rounds=rounds, control=rounds)
    assert overhead.extra_microseconds(comparison, 10, "wall_seconds")["median"] == pytest.approx(0.3e6)
    assert overhead.extra_microseconds(comparison, 10, "cpu_seconds")["median"] == pytest.approx(0.6e6)


@pytest.mark.parametrize("name", ["null", "tiny"])
def test_trainer_and_bare_loops_train_alike(processes: Processes, tmp_path: Path, name: str) -> None:
    overhead = benchmark("trainer_overhead")
    scale = overhead.Scale(rows=2, seq_len=32, steps=2, rounds=2)
    comparisons, summary = overhead.compare_all(name, scale, processes, tmp_path / name)
    differences = summary["largest_weight_difference_from_bare_after_first_call"]
    assert set(differences) == {"trainer", "bare loop", "bare loop, our AdamW and clipping", "bare loop, no FSDP2"}
    assert max(differences.values()) < 1e-6  # of weights that moved by about lr * steps = 2e-3
    assert [len(comparison.rounds) for comparison in comparisons] == [2, 1, 1]
    rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    n_steps = 2 * (1 + (1 + 2 * 6) + (1 + 6))  # one call, then two pairs: a warm-up, and rounds of 2 + 4 calls
    assert [row["step"] for row in rows] == [1, *range(10, n_steps + 1, 10)]


def test_the_reference_is_the_main_example(processes: Processes, tmp_path: Path) -> None:
    reference = benchmark("small_reference")
    steps = 24
    config = reference.configuration(steps, tmp_path, [*TINY, "--data.limit_documents=16", f"--data.cache_dir={tmp_path}"])
    recipe = reference.RECIPE._replace(n_layers=2, d_model=24, n_heads=6)
    ours = benchmark("sliced_trainer").SlicedTrainer(config, processes, RunFolder(tmp_path))
    theirs = reference.ReferenceRun(recipe, ours.tokenizer.vocab_size, reference.rows_of(ours, steps), reference.weights_of(ours))
    with ExitStack() as stack:
        ours.open(stack)
        comparison = reference.in_turns(ours, theirs, steps, 1)
        our_losses = ours.losses()
    their_losses = {key: theirs.loss(batches) for key, batches in ours.held_out.validation_sets.items()}
    assert our_losses["validation_loss"] < 8.9  # below ln 8192 = 9.01, so it has learned
    assert their_losses == pytest.approx(our_losses, abs=1e-4)
    assert (len(comparison.rounds), len(comparison.control)) == (12, 6)


@pytest.mark.parametrize("name", ["gpt_125m", "llama3_1b-compiled", "linear_cpb", "alibi"])
def test_gpu_items_on_a_cpu(name: str) -> None:
    gpu = benchmark("gpu")
    findings: list[dict[str, Any]] = []
    gpu.run_item(gpu.ITEMS[name], findings.append, dry_run=True)
    assert json.loads(json.dumps(findings)) == findings
    if gpu.ITEMS[name].kind == "attention":
        assert [finding["length"] for finding in findings] == [8, 32, 128, 16, 64]
    else:
        (finding,) = findings
        assert len(finding["losses"]) == 3
        assert finding["losses"] == pytest.approx([5.545] * 3, abs=0.1)  # ln 256 nats a random token
        assert finding["tokens_per_second"] == pytest.approx(2 * 32 * 2 / sum(finding["step_seconds"]))


def test_gpu_halves_the_rows_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    items = benchmark("gpu_items")
    asked: list[int] = []

    def measured(name: str, rows: int, processes: Processes, **options: Any) -> dict[str, Any]:
        asked.append(rows)
        if rows > 1:
            raise torch.OutOfMemoryError("no room")
        return {"rows": rows}

    monkeypatch.setattr(items, "_measured", measured)
    findings: list[dict[str, Any]] = []
    items.measure_model("gpt_125m", findings.append, compiled=False, dry_run=True)
    assert asked == [2, 1]
    assert [finding["rows"] for finding in findings] == [2, 1]
    assert findings[0]["error"] == "no room"


def test_gpu_goes_on_after_failures_and_without_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = benchmark("gpu")
    scripts = {
        "gpt_125m": "import sys; open(sys.argv[1], 'w').write('{\"summary\": 1}\\n{\"half'); sys.exit('the reason')",
        "alibi": "import sys, time; open(sys.argv[1], 'w').write('{\"summary\": 2}\\n'); time.sleep(60)",
    }
    monkeypatch.setattr(gpu, "command", lambda name, findings, **_: [sys.executable, "-c", scripts[name], str(findings)])
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.0)
    monkeypatch.setitem(gpu.ITEMS, "alibi", gpu.Item("attention", "alibi", limit_seconds=2.0))
    assert gpu.run_all(["gpt_125m", "alibi"], seconds=30, dry_run=True, folder=tmp_path) == 1
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 10.0)
    written = json.loads((tmp_path / "gpu-dry-run.json").read_text())["results"]
    assert [result["status"] for result in written] == ["failed with exit status 1", "cut off after 2 s"]
    assert [result["findings"] for result in written] == [[{"summary": 1}], [{"summary": 2}]]
    assert "the reason" in written[0]["output"]
    assert gpu.run_all(["gpt_125m"], seconds=5, dry_run=True, folder=tmp_path) == 1
    written = json.loads((tmp_path / "gpu-dry-run.json").read_text())["results"]
    assert [result["status"] for result in written] == ["not run: no time was left"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = benchmark("gpu")
    parsed = argparse.Namespace(dry_run=False, item=None)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda _: parsed)
    assert gpu.main() == 3
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_commands_name_what_they_run(tmp_path: Path) -> None:
    gpu = benchmark("gpu")
    assert gpu.command("alibi", tmp_path, dry_run=True)[1:] == [
        str(ROOT / "benchmarks/gpu.py"), "--item", "alibi", "--findings", str(tmp_path), "--dry-run",
    ]  # fmt: skip
    help_text = subprocess.run([*gpu.command("tests", tmp_path, dry_run=True)[:3], "--version"], capture_output=True, text=True, check=True)
    assert "pytest" in help_text.stdout
