"""The sinks, read back by something other than themselves."""

import io
import json
import math
import os
import pty
import select
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from matplotlib import image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from titanarch.config.errors import ConfigError
from titanarch.train.metrics import config as config_module
from titanarch.train.metrics.config import MetricsConfig, check_sinks
from titanarch.train.metrics.jsonl import JsonlConfig, JsonlSink
from titanarch.train.metrics.log import MetricLog
from titanarch.train.metrics.plot import Curve, PlotConfig, PlotSink, block_means, line_through
from titanarch.train.metrics.progress import ProgressConfig, ProgressSink, clock_text
from titanarch.train.metrics.rows import read_rows
from titanarch.train.metrics.sink import SINKS, SinkContext
from titanarch.train.metrics.tensorboard import TensorboardConfig, TensorboardSink
from titanarch.train.metrics.wandb import WandbConfig, WandbSink

ROW = {"step": 20, "tokens": 81920, "loss": 6.25, "grad_norm": 1.5, "lr": 3e-4, "tokens_per_second": 3702.4, "mfu": 0.381}


def test_the_default_section_and_component_tables() -> None:
    assert [sink.kind for sink in MetricsConfig().sinks] == ["jsonl", "tensorboard", "progress", "plot"]
    section = MetricsConfig.model_validate({"log_freq": 5, "sinks": ["jsonl", {"kind": "tensorboard", "folder": "events"}]})
    assert section.model_dump() == {"log_freq": 5, "sinks": ({"kind": "jsonl"}, {"kind": "tensorboard", "folder": "events"})}
    assert [step for step in range(1, 12) if section.is_logged(step)] == [1, 5, 10]
    assert not MetricsConfig.is_identity("log_freq")
    assert not TensorboardConfig.is_identity("folder")


@pytest.mark.parametrize(
    ("sinks", "message"),
    [(["jsonl", "jsonl"], "'jsonl' is listed twice"), (["tensorbord"], "did you mean 'tensorboard'"), ([{"kind": "wandb"}], "project")],
)
def test_wrong_sinks_are_refused(sinks: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetricsConfig.model_validate({"sinks": sinks})


def test_a_missing_package_is_refused_before_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module.importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    section = MetricsConfig(sinks=(JsonlConfig(), WandbConfig(project="p")))
    with pytest.raises(ConfigError, match=r"\[metrics\] sinks: sink 'wandb' needs the package wandb.*pip install 'titanarch\[wandb\]'"):
        check_sinks(section)
    check_sinks(MetricsConfig())


def test_jsonl_rows_are_in_the_file_at_once_and_strict_json(tmp_path: Path) -> None:
    sink = JsonlSink(JsonlConfig())
    sink.open(SinkContext(tmp_path, "run"))
    sink.log(ROW, 20)
    sink.log({"step": 21, "loss": math.nan, "grad_norm": math.inf}, 21)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines]
    assert strict == [ROW, {"step": 21, "loss": None, "grad_norm": None}]
    assert list(strict[0]) == list(ROW)
    back = list(read_rows(tmp_path / "metrics.jsonl"))
    assert back[0] == ROW
    assert math.isnan(back[1]["loss"])
    with pytest.raises(TypeError, match="metric 'loss' is a str"):
        sink.log({"step": 22, "loss": "6.2"}, 22)  # type: ignore[dict-item]
    sink.close(None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to play a full disk")
def test_jsonl_on_a_full_disk_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    sink = JsonlSink(JsonlConfig())
    sink.open(SinkContext(tmp_path, "run"))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: cannot be written: No space left.*resumes from the last checkpoint"):
        sink.log(ROW, 20)


def test_tensorboard_holds_every_key_and_purges_what_is_run_again(tmp_path: Path) -> None:
    for start_step, steps, offset in ((0, range(1, 8), 0.0), (4, range(5, 7), 100.0)):
        sink = TensorboardSink(TensorboardConfig())
        sink.open(SinkContext(tmp_path, "run", start_step=start_step))
        for step in steps:
            sink.log({"step": step, "loss": offset + step, "lr": 0.5}, step)
        sink.close(None)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss", "lr"]
    assert {event.step: event.value for event in events.Scalars("loss")} == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 105.0, 6: 106.0}


def test_progress_prints_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    sink = ProgressSink(ProgressConfig())
    sink.open(SinkContext(Path("unused"), "run", total_steps=1000))
    sink.log({**ROW, "memory_gib": 1.25, "eta_seconds": 3723.4}, 20)
    sink.log({"step": 20, "validation_loss": 6.5, "train_subset_loss": 6.25}, 20)
    sink.log({"step": 20, "checkpoint_stall_seconds": 0.5, "checkpoint_upload_seconds": 1.5}, 20)  # an event says it
    sink.event("checkpoint saved")
    sink.close(None)
    assert stream.getvalue().splitlines() == [
        "step   20/1000  loss 6.2500  3,702 tok/s  MFU 38.1 %  1.25 GiB  grad 1.5  lr 0.0003  ETA 1:02:03",
        "step 20  validation loss 6.5000  train subset loss 6.2500",
        "checkpoint saved",
    ]
    assert clock_text(2 * 86400 + 5) == "2d 0:00:05"


def test_progress_redraws_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        sink = ProgressSink(ProgressConfig())
        sink.open(SinkContext(Path("unused"), "run", total_steps=30))
        for step in range(1, 31):
            sink.log({**ROW, "step": step}, step)
        sink.event("checkpoint saved")
        sink.close(None)
        terminal.flush()
        monkeypatch.undo()
        shown = ""
        while select.select([leader], [], [], 1.0)[0]:  # a terminal hands on what was written piece by piece
            shown += os.read(leader, 100_000).decode()
    os.close(leader)
    assert "checkpoint saved" in shown
    assert "step 30/30" in shown, "the last row is drawn though rows came faster than the screen is refreshed"
    assert shown.count("step ") < 10
    assert "\r\x1b[2K" in shown, "the line is erased and drawn again"


def test_plot_is_a_picture_that_goes_on_after_a_resume(tmp_path: Path) -> None:
    jsonl, plot = JsonlSink(JsonlConfig()), PlotSink(PlotConfig())
    jsonl.open(SinkContext(tmp_path, "run"))
    for step in range(1, 50):
        jsonl.log({"step": step, "tokens": 100 * step, "loss": 8 - 0.1 * step}, step)
    jsonl.log({"step": 40, "tokens": 4000, "validation_loss": 5.0, "train_subset_loss": 4.5}, 40)
    jsonl.close(None)
    plot.open(SinkContext(tmp_path, "run", start_step=49))
    assert len(plot._train.loss) == 49
    plot.log({"step": 50, "tokens": 5000, "loss": math.nan}, 50)
    assert len(plot._train.loss) == 49
    assert sorted(plot._validation) == ["train_subset_loss", "validation_loss"]
    plot.close({})
    picture = image.imread(tmp_path / "training_loss.png")
    assert picture.shape[:2] == (500, 800)
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "training_loss.png"]


def test_plot_of_one_row_and_of_none(tmp_path: Path) -> None:
    plot = PlotSink(PlotConfig())
    plot.open(SinkContext(tmp_path, "run"))
    plot.close(None)
    assert not (tmp_path / "training_loss.png").exists()
    plot.log({"step": 1, "tokens": 100, "loss": 8.0}, 1)
    plot.close(None)
    assert (tmp_path / "training_loss.png").exists()


def test_points_of_a_long_curve() -> None:
    curve = Curve()
    for step in range(10):
        curve.add({"step": step, "loss": step * step}, "loss")
    assert block_means(curve.loss, 4).tolist() == [np.mean([0, 1, 4]), np.mean([9, 16, 25]), np.mean([36, 49, 64]), 81]
    assert block_means(curve.loss, 10).tolist() == list(curve.loss)
    assert block_means(Curve().loss, 10).tolist() == []
    xs, ys = np.array([1.0, 2.0, 4.0]), np.array([10.0, 30.0, 40.0])
    assert line_through(np.array([0.0, 1.5, 3.0, 6.0]), xs, ys).tolist() == [0.0, 20.0, 35.0, 60.0]


class FakeRun:
    """Records what the sink tells W&B."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.axes: list[tuple[str, str | None]] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = FakeRun(), []
    fake = types.SimpleNamespace(init=lambda **keys: calls.append(keys) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    for result in (None, {"tokens": 5, "status": "finished", "losses": {}}):
        sink = WandbSink(WandbConfig(project="p", tags=("a",), mode="offline"))
        sink.open(SinkContext(tmp_path, "run", config={"training": {"steps": 5}}))
        sink.log({"step": 3, "loss": 1.0}, 3)
        sink.close(result)
        assert run.exit_code == (1 if result is None else 0)
    assert [call["id"] for call in calls] == [(tmp_path / "wandb_id").read_text().strip()] * 2
    assert len(calls[0]["id"]) == 8
    assert calls[0]["config"] == {"training": {"steps": 5}}
    assert (calls[0]["mode"], calls[0]["tags"], calls[0]["entity"]) == ("offline", ["a"], None)
    assert ("*", "step") in run.axes
    assert run.rows[0] == {"step": 3, "loss": 1.0}
    assert run.summary == {"tokens": 5, "status": "finished"}


class Failing:
    """A sink that fails when closed, beside one that must be closed nevertheless."""

    closed: ClassVar[list[str]] = []

    def __init__(self, name: str, fails: bool) -> None:
        self.name, self.fails = name, fails

    def open(self, context: SinkContext) -> None:
        pass

    def close(self, result: Mapping[str, Any] | None) -> None:
        self.closed.append(self.name)
        if self.fails:
            raise OSError(self.name)


def test_every_sink_is_closed_once_though_one_fails(tmp_path: Path) -> None:
    log = MetricLog(MetricsConfig(sinks=()), is_main=True)
    log._configured = (Failing("a", True), Failing("b", False))  # type: ignore[assignment]
    log.open(SinkContext(tmp_path, "run"))
    with pytest.raises(OSError, match="a"):
        log.close()
    log.close()
    assert Failing.closed == ["a", "b"]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    for is_main, n_files in ((False, 0), (True, 1)):
        log = MetricLog(MetricsConfig(sinks=(JsonlConfig(),)), is_main=is_main)
        log.open(SinkContext(tmp_path, "run"))
        log.log(ROW)
        log.event("hello")
        log.close()
        assert len(list(tmp_path.iterdir())) == n_files


def test_every_sink_has_a_schema_with_descriptions() -> None:
    assert sorted(SINKS) == ["jsonl", "plot", "progress", "tensorboard", "wandb"]
    for name in SINKS:
        for key, field in SINKS[name].Config.model_fields.items():
            assert field.description, f"{name}.{key}"
