"""A process killed at any instant of a save leaves the newest committed checkpoint loadable."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from tests.checkpoint.common import checkpointer, one_process
from tests.distributed import CONTEXT
from titanarch.checkpoint.marker import MARKER
from titanarch.checkpoint.storage import Storage
from titanarch.checkpoint.store import load
from titanarch.checkpoint.torch_io import LocalWriter
from titanarch.checkpoint.verifying import problem_of

__all__ = ["one_process"]
pytestmark = pytest.mark.usefixtures("one_process")


def state(value: float) -> dict[str, Any]:
    return {"model": {f"w{i}": torch.full((50_000,), float(value)) for i in range(8)}, "data": {"step": int(value)}}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal may take a moment to arrive


def before(owner: type, name: str, *, call: int = 1) -> None:
    """Die at the ``call``-th call of a method."""
    original = getattr(owner, name)
    calls = []

    def dying(*args: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            die()
        return original(*args, **options)

    setattr(owner, name, dying)


def after(owner: type, name: str) -> None:
    """Die when a method has done its work."""
    original = getattr(owner, name)

    def dying(*args: Any, **options: Any) -> Any:
        original(*args, **options)
        die()

    setattr(owner, name, dying)


def in_the_middle_of_removing() -> None:
    """Die when the marker and one file of an old checkpoint are gone."""
    original = Storage.remove

    def dying(self: Storage, folder: str) -> None:
        self._fs.rm = lambda path, recursive: (os.remove(f"{path}/__0_0.distcp"), die())
        original(self, folder)

    Storage.remove = dying  # type: ignore[method-assign]


INSTANTS: dict[str, tuple[Callable[[], None], int]] = {
    "no data written": (lambda: before(LocalWriter, "write_data"), 2),
    "data half written": (lambda: before(DefaultSavePlanner, "resolve_data", call=5), 2),
    "data written, no index": (lambda: before(LocalWriter, "finish"), 2),
    "index written, no marker": (lambda: before(Storage, "write_marker"), 2),
    "marker half written": (lambda: before(Path, "rename", call=2), 2),  # the first rename is the index's
    "marker written": (lambda: after(Storage, "write_marker"), 3),
    "pruning: before the marker goes": (lambda: before(Storage, "remove"), 3),
    "pruning: half removed": (in_the_middle_of_removing, 3),
}


def save_until_killed(folder: Path, instant: str, saved: Any) -> None:
    """Save steps 1 and 2, then step 3 with death at the instant; without an instant, save until killed."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    saver = checkpointer(folder, keep_latest_k=2)
    for step in range(1, 3 if instant else 100_000):
        saver.save(step, state(step), config_text="", force_sync=True)
        saved.value = step
    INSTANTS[instant][0]()
    saver.save(3, state(3), config_text="", force_sync=True)


def assert_loads(folder: Path, at_least: int) -> int:
    found = state(0)
    loaded = load(folder / "checkpoints", found)
    assert loaded is not None
    assert loaded.step >= at_least
    assert found["data"] == {"step": loaded.step}
    assert all(bool((w == loaded.step).all()) for w in found["model"].values())
    return loaded.step


@pytest.mark.parametrize("instant", INSTANTS)
def test_killed_at(tmp_path: Path, instant: str) -> None:
    saved = CONTEXT.Value("i", 0)
    process = CONTEXT.Process(target=save_until_killed, args=(tmp_path, instant, saved))
    process.start()
    process.join(60)
    assert (process.exitcode, saved.value) == (-signal.SIGKILL, 2), "the process did not die where it should"
    assert assert_loads(tmp_path, 1) == INSTANTS[instant][1]
    storage = Storage(tmp_path / "checkpoints")
    committed = [folder for folder in storage.folders() if storage.is_committed(folder)]
    assert [problem_of(storage, folder, storage.marker(folder)) for folder in committed] == [""] * len(committed)

    saver = checkpointer(tmp_path, keep_latest_k=2)  # the run goes on, and cleans up after itself
    saver.save(4, state(4), config_text="")
    saver.close()
    assert assert_loads(tmp_path, 4) == 4
    folders = list((tmp_path / "checkpoints").iterdir())
    assert len(folders) == 2
    assert all((folder / MARKER).exists() for folder in folders)


@pytest.mark.parametrize("milliseconds", [7, 31, 83])
def test_killed_at_any_time(tmp_path: Path, milliseconds: int) -> None:
    saved = CONTEXT.Value("i", 0)
    process = CONTEXT.Process(target=save_until_killed, args=(tmp_path, "", saved))
    process.start()
    deadline = time.monotonic() + 60
    while saved.value < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(milliseconds / 1000)
    process.kill()
    process.join(60)
    assert saved.value >= 3, "the process saved nothing in a minute"
    assert assert_loads(tmp_path, saved.value) <= saved.value + 1
