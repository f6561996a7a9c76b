"""Steps whose gradient is bad: skipped, stopped at or gone back from, the run is the one that never had their rows."""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from tests.train.faults import POISONED, faulty_forward, without_rows
from tests.train.runs import losses, rows, write_config
from titanarch.cli.main import main
from titanarch.data.ledger_check import check_ledger
from titanarch.data.ledger_files import read_ledger
from titanarch.data.loader import IndexedLoader
from titanarch.models.language_model import CausalLanguageModel

G, STEPS = 8, 14
CONSTANT = ["--lr_scheduler.kind", "constant", "--validation.enable", "false", "--evaluation.enable", "false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recovery")


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward and the loader, after the test."""
    monkeypatch.setattr(CausalLanguageModel, "forward", CausalLanguageModel.forward)
    monkeypatch.setattr(IndexedLoader, "__next__", IndexedLoader.__next__)


def run(
    folder: Path,
    name: str,
    *overrides: str,
    faults: dict[int, str] | None = None,
    without: Collection[int] = (),
    steps: int = STEPS,
    status: int = 0,
) -> Path:
    """A run of ``steps`` steps in which rows have ``faults``, and to which the steps of the rows ``without`` do not exist."""
    forward, following = CausalLanguageModel.forward, IndexedLoader.__next__
    CausalLanguageModel.forward = faulty_forward(faults or {})  # type: ignore[method-assign]
    IndexedLoader.__next__ = without_rows(without)  # type: ignore[method-assign, assignment]
    try:
        config = write_config(folder, name, folder / "cache")
        assert main(["train", "--config", str(config), "--training.steps", str(steps), *CONSTANT, *overrides]) == status
    finally:
        CausalLanguageModel.forward = forward  # type: ignore[method-assign]
        IndexedLoader.__next__ = following  # type: ignore[method-assign]
    return folder / name


def rows_of(step: int) -> range:
    return range((step - 1) * G, step * G)


def report(path: Path, step: int) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((path / "reports" / f"step-{step}.json").read_text())
    return loaded


NAN, INF, SPIKE = 6, 7, 11
"""Steps of the faults, in a row of each."""
FAULTS = {rows_of(NAN)[3]: "nan", rows_of(INF)[0]: "inf", rows_of(SPIKE)[7]: "spike"}
SKIP = ["--bad_gradients.nonfinite", "skip", "--bad_gradients.spike", "skip"]
SPIKES = ["--bad_gradients.spike_window", "8", "--bad_gradients.spike_deviations", "12"]


@pytest.fixture(scope="module")
def skipping(folder: Path) -> Path:
    return run(folder, "skipping", *SKIP, *SPIKES, faults=FAULTS)


def test_skipped_steps_leave_the_run_without_their_rows(folder: Path, skipping: Path) -> None:
    expected = losses(run(folder, "without", without=FAULTS, steps=STEPS - 3))
    found = losses(skipping)
    assert sorted({*range(1, STEPS + 1)} - found.keys()) == [NAN, INF, SPIKE]
    assert [found[s] for s in sorted(found)] == [expected[s] for s in sorted(expected)]
    logged = {row["step"]: row for row in rows(skipping) if "skipped_norm" in row}
    assert {step: (row["skipped_first_row"], row["skipped_last_row"]) for step, row in logged.items()} == {
        step: (rows_of(step)[0], rows_of(step)[-1]) for step in (NAN, INF, SPIKE)
    }
    assert logged[SPIKE]["skipped_norm"] > logged[SPIKE]["skipped_threshold"]
    assert logged[NAN]["skipped_norm"] is None
    assert json.loads((skipping / "result.json").read_text())["skipped_steps"] == 3
    assert not (folder / "without" / "reports").exists()


def test_the_reports_name_the_cause(skipping: Path) -> None:
    told = report(skipping, NAN)
    assert told["gradients_not_finite"] == [f"{POISONED}.weight"]
    assert told["first_module_not_finite_forward"] is None
    assert told["first_module_not_finite_backward"] == POISONED
    assert told["norms_by_layer"]["layers.1"] == "nan"
    assert math.isfinite(told["norms_by_layer"]["layers.0"])
    logged = {row["step"]: row["grad_norm"] for row in rows(skipping) if "grad_norm" in row}
    assert {each["step"]: each["grad_norm"] for each in told["last_norms"][:-1]} == {s: logged[s] for s in range(1, NAN)}
    layers = {each["step"]: each["norms"] for each in told["last_norms_by_layer"]}
    assert sorted(layers) == list(range(1, NAN + 1))
    assert {step: math.sqrt(sum(norm**2 for norm in layers[step].values())) for step in range(1, NAN)} == pytest.approx(
        {step: logged[step] for step in range(1, NAN)}, rel=1e-5
    )
    assert {layer: float(norm) for layer, norm in layers[NAN].items()} == pytest.approx(
        {layer: float(norm) for layer, norm in told["norms_by_layer"].items()}, rel=1e-5, nan_ok=True
    )
    assert sorted(map(int, told["text"])) == list(rows_of(NAN))
    infinite = report(skipping, INF)
    assert infinite["first_module_not_finite_forward"]["module"] == "(the model)"
    # The fault is in the loss, so the last module is the first in backward order.
    assert infinite["first_module_not_finite_backward"] in ("(the model)", "final_norm")
    spike = report(skipping, SPIKE)
    assert (spike["what"], spike["first_module_not_finite_forward"], spike["gradients_not_finite"]) == ("spike", None, [])
    assert math.sqrt(sum(norm**2 for norm in spike["norms_by_layer"].values())) == pytest.approx(spike["norm"], rel=1e-5)


def test_a_run_that_stopped_goes_on_where_it_may_skip(folder: Path, skipping: Path) -> None:
    """The step before the bad one is the last; what stopped is taken up by the same command with other actions."""
    path = run(folder, "stopped", *SPIKES, faults=FAULTS, status=1)
    expected = losses(skipping)
    assert losses(path) == {step: loss for step, loss in expected.items() if step < NAN}
    assert report(path, NAN)["gradients_not_finite"] == [f"{POISONED}.weight"]
    run(folder, "stopped", *SKIP, *SPIKES, faults=FAULTS)
    assert losses(path) == expected
    steps = [each["step"] for each in report(path, SPIKE)["last_norms_by_layer"]]
    assert steps == list(range(1, SPIKE + 1)), "those before the restart too"


def test_a_roll_back_leaves_the_run_without_the_rows_since_the_checkpoint(folder: Path) -> None:
    """Twice: from step 8 to 5 and, on the rows that follow, from step 12 to 10. So it is where a start ends before it saved again."""
    keys = ["--bad_gradients.nonfinite", "roll_back", "--data.ledger", "true"]
    # Step 6 begins with row 64 after the first roll-back, so row 64 + 6 * 8 is in step 12.
    faults = {rows_of(8)[2]: "inf", 64 + 6 * G: "nan"}
    path = run(folder, "rolled", *keys, faults=faults)
    gone = [*range(5 * G, 8 * G), *range(64 + 5 * G, 64 + 7 * G)]
    expected = losses(run(folder, "never", without=gone))
    assert losses(path) == expected
    logged = [row for row in rows(path) if "rolled_back_from" in row]
    assert [(row["step"], row["rolled_back_from"]) for row in logged] == [(6, 8), (11, 12)]
    assert (logged[0]["skipped_first_row"], logged[0]["skipped_last_row"]) == (56, 63)
    discarded = [json.loads(line)["step"] for line in (path / "metrics.discarded.jsonl").read_text().splitlines()]
    assert discarded == [6, 7, 11]
    assert report(path, 8)["action"] == "roll_back"
    run(folder, "rolled_in_two", *keys, "--checkpoint.last_save", "false", faults=faults, steps=9)
    again = run(folder, "rolled_in_two", *keys, faults=faults)
    assert losses(again) == expected
    for each in (path, again):
        ledger = check_ledger(read_ledger(each))
        assert (ledger.problems, ledger.n_skipped, ledger.n_rows) == ((), len(gone), STEPS * G)


def test_before_the_first_checkpoint_a_run_goes_back_to_its_beginning(folder: Path) -> None:
    path = run(folder, "to_zero", "--bad_gradients.nonfinite", "roll_back", faults={rows_of(2)[0]: "inf"}, steps=4)
    assert losses(path) == losses(run(folder, "from_row_16", without=range(2 * G), steps=4))


def test_too_many_roll_backs_stop_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["--bad_gradients.nonfinite", "roll_back", "--bad_gradients.max_roll_backs", "2"]
    run(folder, "too_many", *keys, faults=dict.fromkeys(range(2 * G, 100 * G), "inf"), steps=4, status=1)
    assert "step 1: the loss is" in (said := capsys.readouterr().err)
    assert "rolled back 2 times already" in said


def test_a_roll_back_needs_checkpoints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "none", "--bad_gradients.spike", "roll_back", "--checkpoint.enable", "false", status=2)
    assert "bad_gradients" in (said := capsys.readouterr().err)
    assert "checkpoint.enable" in said
