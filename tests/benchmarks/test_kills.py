"""Runs killed by SIGKILL and resized: five of the kills that benchmarks/kills.py makes."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_five_kills_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    kills = importlib.import_module("kills")
    campaign = kills.Campaign(tmp_path, seed=5, families=("fixed", "streamed"), steps=24)
    campaign.run(2, ("save", "any"))
    if len(campaign.runs) == 1:
        campaign.run(5, ("commit", "step", "commit"))
    totals = campaign.totals()
    assert (totals["rows_lost"], totals["rows_doubled"], totals["ledger_problems"], totals["steps_with_other_rows"]) == (0, 0, 0, 0)
    assert totals["kills"] == 5
    assert totals["unusable_checkpoints"] == 0
    assert {run.family: run.bitwise for run in campaign.runs}["fixed"]
    assert totals["largest_relative_loss_difference_of_resized_runs"] < 1e-5


def test_the_committed_result_is_of_a_hundred_kills() -> None:
    saved = json.loads((BENCHMARKS / "results" / "kills.json").read_text())
    kills = [row["kill"] for row in saved["results"] if "kill" in row]
    runs = [row["run"] for row in saved["results"] if "run" in row]
    assert len(kills) == saved["settings"]["totals"]["kills"] == 100
    assert [kill["unusable"] for kill in kills] == [[]] * 100
    assert {(run["n_lost"], run["n_doubled"], len(run["problems"]), len(run["other_rows"])) for run in runs} == {(0, 0, 0, 0)}
    assert all(run["bitwise"] for run in runs if run["family"] == "fixed")
    assert {kill["doing"].split(":")[0] for kill in kills} == {"start", "steps", "save", "commit"}
