"""Saving, committing, verifying, pruning and loading on one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.common import (
    assert_bitwise,
    assert_filled,
    build,
    checkpointer,
    digests,
    filled,
    names,
    one_process,
    save_steps,
    state_of,
    tensors,
    train,
)
from titanarch.checkpoint.errors import CheckpointError
from titanarch.checkpoint.marker import MARKER
from titanarch.checkpoint.store import load
from titanarch.config.errors import ConfigError

__all__ = ["one_process"]
pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("mode", ["async", "process", "disabled"])
def test_round_trip_is_bitwise(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    net, optimizers = build(0)
    train(net, optimizers, start=0, steps=2)
    expected = tensors(net, optimizers)
    saver = checkpointer(tmp_path, async_mode=mode)
    saver.save(2, state_of(net, optimizers), config_text="[model]\n")
    continued = train(net, optimizers, start=2, steps=3)  # in place, while the upload may be running
    saver.maybe_wait()
    saver.wait()
    folder = tmp_path / "checkpoints/step-00000002"
    assert json.loads((folder / MARKER).read_text())["files"] == digests(folder)
    assert sorted(digests(folder)) == [".metadata", "__0_0.distcp"]
    assert not all(torch.equal(expected[name], now) for name, now in tensors(net, optimizers).items()), "training changed nothing"

    other, others = build(1)
    loaded = saver.load(state_of(other, others))
    assert loaded is not None
    assert (loaded.step, loaded.config, loaded.world_size, loaded.skipped) == (2, "[model]\n", 1, ())
    assert_bitwise(tensors(other, others), expected)
    assert train(other, others, start=2, steps=3) == continued
    saver.close()


@pytest.mark.parametrize("mode", ["async", "process"])
def test_changing_the_weights_right_after_the_call_does_not_tear(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    saver = checkpointer(tmp_path, async_mode=mode, keep_latest_k=0)
    weights = {f"w{i}": torch.zeros(200_000) for i in range(20)}
    for step in range(1, 4):
        for tensor in weights.values():
            tensor.fill_(step)
        saver.save(step, {"model": weights}, config_text="")
        for tensor in weights.values():
            tensor.fill_(-step)
    saver.close()
    for step in range(1, 4):
        state: dict[str, Any] = {"model": {name: torch.empty(200_000) for name in weights}}
        load(tmp_path / "checkpoints", state, step=step)
        assert [float(w.unique()) for w in state["model"].values()] == [step] * 20


def test_checkpoints_are_due_every_interval(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, interval=3)
    assert [step for step in range(10) if saver.due(step)] == [3, 6, 9]
    saver.close()


def test_disabled_saves_and_loads_nothing(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    saver = checkpointer(tmp_path, enable=False)
    saver.save(2, filled(2), config_text="")
    state = filled(0)
    assert saver.load(state) is None
    assert not saver.due(1)
    saver.close()
    assert_filled(state, 0)
    assert names(tmp_path) == ["step-00000001"]


def test_only_the_latest_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3, 4], keep_latest_k=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    save_steps(tmp_path, [5, 6], keep_latest_k=0)
    assert names(tmp_path) == [f"step-0000000{step}" for step in (3, 4, 5, 6)]


def test_a_run_that_went_back_continues_its_new_branch(tmp_path: Path) -> None:
    save_steps(tmp_path, [10, 20])
    saver = checkpointer(tmp_path, load_step=10, keep_latest_k=2)
    loaded = saver.load(filled(0))
    assert loaded is not None
    assert loaded.step == 10
    saver.save(15, filled(15), config_text="")
    saver.save(20, filled(20.5), config_text="")
    saver.close()
    assert names(tmp_path) == ["step-00000015", "step-00000020-1"]
    state = filled(0)
    loaded = load(tmp_path / "checkpoints", state)
    assert loaded is not None
    assert loaded.path.endswith("step-00000020-1")
    assert_filled(state, 20.5)


def test_nothing_to_resume(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path)
    assert saver.load(filled(0)) is None
    saver.close()


def test_a_step_that_is_not_there_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2])
    saver = checkpointer(tmp_path, load_step=7)
    with pytest.raises(ConfigError, match=r"\[checkpoint\] load_step: no sound checkpoint of step 7 .*step-00000001, step-00000002"):
        saver.load(filled(0))
    saver.close()


def test_objects_not_asked_for_are_left_alone(tmp_path: Path) -> None:
    save_steps(tmp_path, [3])
    state = {"model": filled(0)["model"]}
    loaded = load(tmp_path / "checkpoints", state)
    assert loaded is not None
    assert all(bool((tensor == 3).all()) for tensor in state["model"].values())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def scramble(path: Path) -> None:
    path.write_bytes(b"\x80\x04" + b"q" * (path.stat().st_size - 2))


def flip(path: Path) -> None:
    """Another letter in the middle of a marker's configuration; elsewhere another bit, in the middle."""
    data = bytearray(path.read_bytes())
    place = data.index(b"[training]") + 1 if path.name == MARKER else len(data) // 2
    data[place] ^= 1
    path.write_bytes(data)


def replace_by_link(path: Path) -> None:
    """The same content, of another folder's file."""
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


DAMAGE = {
    "never committed": (lambda folder: (folder / MARKER).unlink(), "has no COMMITTED.json"),
    "marker cut off": (lambda folder: cut(folder / MARKER), "COMMITTED.json is cut off"),
    "marker of no program": (lambda folder: (folder / MARKER).write_text('{"format_version": "x"}'), "format_version 'x'"),
    "marker with one byte flipped": (lambda folder: flip(folder / MARKER), "COMMITTED.json is damaged"),
    "data with one byte flipped": (lambda folder: flip(folder / "__0_0.distcp"), "__0_0.distcp is damaged: its SHA-256"),
    "index with one byte flipped": (lambda folder: flip(folder / ".metadata"), ".metadata is damaged: its SHA-256"),
    "a link to outside": (lambda folder: replace_by_link(folder / "__0_0.distcp"), "__0_0.distcp is a symbolic link to outside"),
    "data cut off": (lambda folder: cut(folder / "__0_0.distcp"), "__0_0.distcp has"),
    "data missing": (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "index missing": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
    "index scrambled": (lambda folder: scramble(folder / ".metadata"), ".metadata is damaged: its SHA-256"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_by_name(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(tmp_path, [1, 2, 3])
    damage_folder, reason = DAMAGE[damage]
    damage_folder(tmp_path / "checkpoints" / "step-00000003")
    state = filled(0)
    loaded = load(tmp_path / "checkpoints", state)
    assert loaded is not None
    assert loaded.step == 2
    assert_filled(state, 2)
    assert len(loaded.skipped) == 1
    assert "step-00000003: " in loaded.skipped[0]
    assert reason in loaded.skipped[0]
    assert loaded.skipped[0] in caplog.text


def test_only_damaged_checkpoints_are_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    cut(tmp_path / "checkpoints/step-00000001/__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used: .*step-00000001.*Restore one, or remove"):
        load(tmp_path / "checkpoints", filled(0))


def test_a_leftover_is_never_written_into(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2])
    leftover = tmp_path / "checkpoints/step-00000002"
    (leftover / MARKER).unlink()
    (leftover / "__7_0.distcp").write_bytes(b"of another number of processes")
    save_steps(tmp_path, [2])
    assert names(tmp_path) == ["step-00000001", "step-00000002-1"]
    marker = json.loads((tmp_path / "checkpoints/step-00000002-1" / MARKER).read_text())
    assert sorted(marker["files"]) == [".metadata", "__0_0.distcp"]


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_urls(tmp_path: Path, scheme: str) -> None:
    location = f"{scheme}://{tmp_path}/run"
    saver = checkpointer(tmp_path, folder=location, keep_latest_k=2)
    for step in (1, 2, 3):
        saver.save(step, filled(step), config_text="")
    state = filled(0)
    loaded = saver.load(state)
    saver.close()
    assert loaded is not None
    assert (loaded.step, loaded.path) == (3, f"{location}/step-00000003")
    assert_filled(state, 3)
    with pytest.raises(ConfigError, match="there: step-00000002, step-00000003"):
        load(location, filled(0), step=1)


def test_a_checkpoint_that_does_not_fit_is_refused_with_all_differences(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    state = {
        "model": {"w": torch.zeros(999), "b": torch.zeros(3, 5, dtype=torch.float64), "c": torch.zeros(1)},
        "data": {},
        "schedule": {"x": 1},
    }
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "checkpoints", state)
    for part in (
        "model.w has shape (999,) here and (1000,) in the checkpoint",
        "model.b is torch.float64 here and torch.float32 in the checkpoint",
        "model.c is missing in the checkpoint",
        "it holds no 'schedule'",
    ):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match=r"model\.b is only in the checkpoint"):
        load(tmp_path / "checkpoints", {"model": {"w": torch.zeros(1000)}})
