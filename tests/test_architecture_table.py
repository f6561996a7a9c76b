"""scripts/architecture_table.py: what it makes of runs that have ended, and what it says of those that have not."""

import importlib.util
import json
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


def write_run(script: Any, name: str, seed: int, loss: float, first: float) -> None:
    folder = script.folder(name, seed, 20)
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
    }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": first}) + "\n")


def test_a_page_of_the_runs_that_have_ended(script: Any, tmp_path: Path) -> None:
    for seed, loss in ((1, 4.0), (2, 4.2)):
        write_run(script, "attention", seed, loss, 9.0)
        write_run(script, "mamba2", seed, loss - 0.1 * seed, 9.1)
    write_run(script, "rwkv7", 1, 5.0, 9.2)
    arguments = ["--names", "attention", "mamba2", "rwkv7", "--seeds", "1", "2", "--steps", "20", "--table-only", "--out", "page.md"]
    assert script.main(arguments) == 0
    page = (tmp_path / "page.md").read_text()
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for line in page.splitlines() if len(cells := line.split("|")) > 3}
    assert rows["mamba2"] == ["2", "9.100", "3.950 ± 0.071", "-0.150 ± 0.071", "100", "1.5", "10.00", "5.00", "21.0"]
    assert rows["attention"][2:4] == ["4.100 ± 0.141", ""]
    assert rows["rwkv7"][:4] == ["1", "9.200", "5.000", "+1.000"]
    assert list(rows)[2:] == ["mamba2", "attention", "rwkv7"], "the lowest loss first"
    assert "Not seen with every seed: rwkv7." in page
    assert "20 steps of 64 tokens" in page


def test_nothing_has_ended(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--names", "attention", "--table-only"]) == 1
    assert "no run has ended" in capsys.readouterr().err
