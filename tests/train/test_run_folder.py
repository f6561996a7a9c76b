"""The run folder: who may write, what is refused, and what a kill leaves behind."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from titanarch.config.errors import ConfigError
from titanarch.train.metrics.files import atomic_write, json_ready
from titanarch.train.metrics.rows import read_rows
from titanarch.train.run_folder import RunFolder

IDENTITY = {"model.layers": ("attention", "mamba2"), "optimizer.lr": 3e-4, "training.steps": 100, "seed": 7}


def start(path: Path, *, identity: dict[str, Any] = IDENTITY, toml: str = "a = 1\n", allowed: tuple[str, ...] = ()) -> RunFolder:
    return RunFolder.start(path, identity=identity, config_toml=toml, environment={"torch": "2"}, allowed=allowed)


def test_each_start_is_recorded(tmp_path: Path) -> None:
    for number, toml in ((1, "a = 1\n"), (2, "a = 2\n")):
        folder = start(tmp_path / "new" / "run", toml=toml)
        assert folder.start_number == number
        assert folder.is_resume == (number == 2)
        assert folder.config_path.read_text() == toml
        folder.close()
    assert sorted(p.name for p in folder.configs_path.iterdir()) == ["start-1.json", "start-1.toml", "start-2.json", "start-2.toml"]
    assert (folder.configs_path / "start-1.toml").read_text() == "a = 1\n"
    assert json.loads((folder.configs_path / "start-2.json").read_text()) == {"torch": "2"}
    assert not [p for p in folder.path.rglob("*") if p.name.endswith(".tmp")]


def with_a_row(path: Path) -> None:
    """Start and end a run that logged a step."""
    folder = start(path)
    folder.metrics_path.write_text('{"step": 1, "loss": 9.0}\n')
    folder.close()


def test_a_start_that_failed_before_its_first_row_binds_nothing(tmp_path: Path) -> None:
    start(tmp_path).close()
    start(tmp_path, identity={**IDENTITY, "optimizer.lr": 1e-3}).close()
    assert json.loads((tmp_path / "identity.json").read_text())["optimizer.lr"] == 1e-3


def test_another_configuration_is_refused_with_every_difference_and_changes_nothing(tmp_path: Path) -> None:
    with_a_row(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = {**IDENTITY, "optimizer.lr": 1e-3, "training.steps": 200, "model.width": 64}
    del other["seed"]
    with pytest.raises(ConfigError) as refused:
        start(tmp_path, identity=other, toml="other\n", allowed=("training.steps",))
    assert str(refused.value).splitlines() == [
        f"[job] dump_folder: {tmp_path} holds a run with another configuration; choose another folder, or take back what is listed below",
        "[model] width: is 64 here, but absent in the run",
        "[optimizer] lr: is 0.001 here, but 0.0003 in the run",
        "seed: is absent here, but 7 in the run",
    ]
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    start(tmp_path).close()  # the lock was given back


def test_an_allowed_difference_is_kept(tmp_path: Path) -> None:
    with_a_row(tmp_path)
    longer = {**IDENTITY, "training.steps": 200}
    with pytest.raises(ConfigError, match=r"\[training\] steps: is 200 here, but 100"):
        start(tmp_path, identity=longer)
    start(tmp_path, identity=longer, allowed=("training.steps",)).close()
    start(tmp_path, identity=longer).close()


def test_paths_that_can_be_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"\[job\] dump_folder: .* a file; choose another"):
            start(path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"holds metrics\.jsonl but no identity\.json"):
        start(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with_a_row(tmp_path)
    (tmp_path / "identity.json").write_text('{"seed": 7')
    with pytest.raises(ConfigError, match=r"identity\.json: is not JSON"):
        start(tmp_path)


def test_a_second_live_run_is_refused_naming_the_owner(tmp_path: Path) -> None:
    folder = start(tmp_path)
    with pytest.raises(ConfigError, match=rf"is in use by process {os.getpid()} on .*; wait for it or stop it"):
        start(tmp_path)
    folder.close()
    folder.close()
    start(tmp_path).close()


HOLDER = """
import multiprocessing, sys, time
from pathlib import Path
from titanarch.train.run_folder import RunFolder

def work() -> None:
    time.sleep(60)

folder = RunFolder.start(Path(sys.argv[1]), identity={"seed": 7}, config_toml="", environment={})
worker = multiprocessing.get_context("fork").Process(target=work)
worker.start()
print(worker.pid, flush=True)
time.sleep(60)
"""


def test_a_killed_run_gives_the_lock_back_though_its_forked_workers_live_on(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    worker_pid = int(holder.stdout.readline())
    try:
        with pytest.raises(ConfigError, match=f"process {holder.pid} on"):
            start(tmp_path, identity={"seed": 7})
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(worker_pid, 0)  # the worker is alive
        time.sleep(0.05)
        start(tmp_path, identity={"seed": 7}).close()
    finally:
        holder.kill()
        os.kill(worker_pid, signal.SIGKILL)
        holder.stdout.close()


def line(step: int, loss: float | None = 1.0) -> str:
    return json.dumps({"step": step, "loss": loss}) + "\n"


def test_rows_past_the_loaded_step_are_set_aside_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    folder = start(tmp_path)
    text = line(1) + line(2, None) + "\0\0damaged\n" + line(3) + line(4)
    folder.metrics_path.write_text(text + line(5)[:9])
    trimmed = folder.resume_at(3)
    assert (trimmed.n_kept, trimmed.n_discarded, trimmed.dropped_torn_line) == (3, 2, True)
    assert folder.metrics_path.read_text() == line(1) + line(2, None) + line(3)
    assert folder.discarded_path.read_text() == "\0\0damaged\n" + line(4)
    assert [row["step"] for row in read_rows(folder.metrics_path)] == [1, 2, 3]
    assert math.isnan(list(read_rows(folder.metrics_path))[1]["loss"])
    assert "3 rows of metrics kept, 2 of later steps set aside, a torn last line dropped" in str(trimmed)
    folder.resume_at(0)
    assert folder.metrics_path.read_text() == ""
    assert folder.discarded_path.read_text() == "\0\0damaged\n" + line(4) + line(1) + line(2, None) + line(3)
    folder.close()


def test_a_clean_file_is_left_alone(tmp_path: Path) -> None:
    folder = start(tmp_path)
    assert folder.resume_at(10).n_kept == 0
    folder.metrics_path.write_text(line(1) + line(2))
    inode = folder.metrics_path.stat().st_ino
    assert folder.resume_at(2).n_kept == 2
    assert folder.metrics_path.stat().st_ino == inode
    assert not folder.discarded_path.exists()
    folder.close()


def test_a_row_cut_at_any_byte_is_dropped_whole(tmp_path: Path) -> None:
    whole = line(10) + line(20, 2.5)
    folder = RunFolder(tmp_path)
    for cut in range(len(line(10)), len(whole)):
        folder.metrics_path.write_text(whole[:cut])
        folder.resume_at(20)
        assert folder.metrics_path.read_text() == line(10)
        assert not folder.discarded_path.exists()


def test_result_is_whole_or_absent(tmp_path: Path) -> None:
    folder = start(tmp_path)
    assert folder.read_result() is None
    assert not folder.set_aside_result()
    folder.write_result({"losses": {"train": 2.5, "validation": math.nan}, "run": tmp_path, "lengths": (128, 512)})
    assert folder.read_result() == {"losses": {"train": 2.5, "validation": None}, "run": str(tmp_path), "lengths": [128, 512]}
    before = folder.result_path.read_bytes()
    with pytest.raises(TypeError, match="set has no form in JSON"):
        folder.write_result({"losses": {1, 2}})
    assert folder.result_path.read_bytes() == before
    assert folder.set_aside_result()
    assert folder.read_result() is None
    assert folder.previous_result_path.read_bytes() == before
    folder.close()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    atomic_write(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"result\.json: cannot be written: No space left on device; make room"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_json_ready_keeps_what_json_can_hold() -> None:
    assert json_ready({1: (True, None, 0.1, "x")}) == {"1": [True, None, 0.1, "x"]}
