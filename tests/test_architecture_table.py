"""scripts/architecture_table.py: what it makes of runs that have ended, and what it says of those that have not."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "architecture_table.py"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with runs in a folder of its own."""
    spec = importlib.util.spec_from_file_location("architecture_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def write_run(script: Any, name: str, seed: int, loss: float, first: float, *, later: float = 6.0) -> None:
    folder = script.folder(name, seed, 30)
    folder.mkdir(parents=True)
    result = {
        "losses": {"validation": loss},
        "tokens_per_second": 100.0,
        "peak_memory_gib": 1.5,
        "parameters": 12_000_000,
        "non_embedding_parameters": 10_000_000,
        "active_parameters": 7_000_000,
        "forward_flops_per_token": 21e6,
        "tokens": 1280,
        "step": 20,
        "epochs": 0.001,
        "environment": {"device": "a CPU"},
        "run": str(folder),
    }
    (folder / "result.json").write_text(json.dumps(result))
    losses = {1: first, 20: 99.0, 21: later, 30: 5.0}
    rows = [*({"step": step, "loss": value} for step, value in losses.items()), {"step": 30, "checkpoint_stall_seconds": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(tmp_path: Path, *names: str) -> list[str]:
    chosen = ["--names", *names, "--seeds", "1", "2", "--steps", "30", "--store", str(tmp_path / "runs.jsonl")]
    return [*chosen, "--table-only", "--out", "page.md"]


def cells_of(page: str) -> dict[str, list[str]]:
    return {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for line in page.splitlines() if len(cells := line.split("|")) > 3}


def test_a_page_of_the_runs_that_have_ended(script: Any, tmp_path: Path) -> None:
    for seed, loss in ((1, 4.0), (2, 4.2)):
        write_run(script, "attention", seed, loss, 9.0)
        write_run(script, "mamba2", seed, loss - 0.1 * seed, 9.1, later=5.0 + seed)
    write_run(script, "rwkv7", 1, 5.0, 9.2, later=float("nan"))
    assert script.main(arguments(tmp_path, "attention", "mamba2", "rwkv7")) == 0
    page = (tmp_path / "page.md").read_text()
    rows = cells_of(page)
    assert rows["mamba2"] == ["2", "9.100", "7.000", "3.950 ± 0.071", "-0.150 ± 0.071", "100", "1.5", "10.00", "5.00", "21.0"]
    assert rows["attention"][2:5] == ["6.000", "4.100 ± 0.141", ""]
    assert rows["rwkv7"][:5] == ["1", "9.200", "inf", "5.000", "+1.000"]
    assert list(rows)[2:] == ["mamba2", "attention", "rwkv7"], "the lowest loss first"
    assert "Not seen with every seed: rwkv7." in page
    assert "above ln 8,192: rwkv7." in page
    assert "30 steps of 64 tokens" in page
    assert "on a CPU (a CPU; 1 at a time" in page


def test_what_the_notes_saw_fail_stands_beside_its_mended_form(script: Any, tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(script, "monarch", seed, 4.0, 9.0)
        write_run(script, "monarch_as_in_the_notes", seed, 4.0 + 0.5 * seed, 9.0)
        write_run(script, "isotropic", seed, 4.0, 9.0)
        write_run(script, "isotropic_as_in_the_notes", seed, 3.9, 9.0, later=9.5)
    names = ("monarch", "monarch_as_in_the_notes", "isotropic", "isotropic_as_in_the_notes")
    assert script.main(arguments(tmp_path, *names)) == 0
    page = (tmp_path / "page.md").read_text()
    assert "notes, did not diverge here. The loss of `monarch` from it: -0.750 ± 0.354." in page
    assert "notes, diverged here. The loss of `isotropic` from it: +0.100 ± 0.000." in page


def test_what_is_stored_needs_no_folder(script: Any, tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(script, "attention", seed, 4.0, 9.0)
    assert script.main(arguments(tmp_path, "attention")) == 0
    shutil.rmtree(script.RUNS)
    assert script.main(arguments(tmp_path, "attention")) == 0
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2, "none is stored twice"
    assert str(tmp_path) not in (tmp_path / "runs.jsonl").read_text(), "nor where it was"
    assert cells_of((tmp_path / "page.md").read_text())["attention"][0] == "2"
    assert script.main([*arguments(tmp_path, "attention"), "--", "--training.global_batch_size=4"]) == 1, "those were other runs"


def test_nothing_has_ended(script: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert script.main(arguments(tmp_path, "attention")) == 1
    assert "no run has ended" in capsys.readouterr().err
