"""What fits: micro-batches, and what a run says and does when memory runs out. The traces are small ones of the real code."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.plan.conftest import Configure
from tests.train.runs import losses, write_config
from titanarch.cli.train import OUT_OF_MEMORY_STATUS
from titanarch.config.errors import ConfigError
from titanarch.config.load import load_config
from titanarch.plan.fit import TracingPlanner, advice, changed, changes, largest_rows, peak_of, with_rows
from titanarch.train import launch
from titanarch.train.local_batch import row_choices, with_local_batch
from titanarch.train.memory_report import OutOfMemory, is_out_of_memory
from titanarch.train.processes import Processes
from titanarch.train.run_config import RunConfig
from titanarch.train.trainer import Trainer

ALLOCATION = "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."


def peak(config: RunConfig, rows: int) -> float:
    return float(peak_of(with_rows(config, rows), world_size=1, device_type="cpu").total)


def test_the_largest_micro_batch_fits_and_the_next_does_not(configure: Configure) -> None:
    config = configure({"training.local_batch_size": "auto", "model.n_layers": 1})
    by_rows = {rows: peak(config, rows) for rows in (2, 4)}
    assert by_rows[2] < by_rows[4]
    middle = (by_rows[2] + by_rows[4]) / 2
    assert largest_rows(config, world_size=1, device_type="cpu", capacity_bytes=middle) == (2, by_rows[2])


def test_all_rows_at_once_and_none_at_all(configure: Configure) -> None:
    config = configure({"training.local_batch_size": "auto", "training.global_batch_size": 2, "model.n_layers": 1})
    assert largest_rows(config, world_size=1, device_type="cpu", capacity_bytes=1e12)[0] == 2
    assert largest_rows(config, world_size=1, device_type="cpu", capacity_bytes=1e3)[0] == 0


def test_row_choices_divide_the_rows() -> None:
    assert row_choices(12) == [12, 6, 4, 3, 2, 1]


def test_changes_are_ordered_and_change_what_they_name(configure: Configure) -> None:
    config = configure({"training.local_batch_size": 8})
    found = list(changes(config, 4))
    assert found[0] == {"training.local_batch_size": 4}
    assert {"activation_checkpoint.mode": "full"} in found
    assert changed(config, {"training.local_batch_size": 3}).training.local_batch_size == 3


def test_advice_names_a_change_that_fits(configure: Configure) -> None:
    config = configure({"model.n_layers": 1})
    capacity = (peak(config, 8) + peak(config, 2)) / 2
    text = advice(config, world_size=1, device_type="cpu", capacity_bytes=capacity)
    assert "activations" in text
    assert "optimizer states" in text
    assert "training.local_batch_size = 2" in text or "training.local_batch_size = 4" in text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError(ALLOCATION), True),
        (MemoryError(), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_only_allocators_errors_are_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


class StubPlanner:
    """Answers without tracing; ``rows``: what fits."""

    def __init__(self, rows: int = 2) -> None:
        self.rows = rows

    def largest_rows(self, config: RunConfig, *, world_size: int, device_type: str, capacity_bytes: float) -> tuple[int, float]:
        assert capacity_bytes > 2**20, "the machine has some memory left"
        return self.rows, 2.0**30

    def advice(self, config: RunConfig, *, world_size: int, device_type: str, capacity_bytes: float) -> str:
        return "try training.local_batch_size = 1"


def test_auto_becomes_a_number_or_a_refusal(configure: Configure) -> None:
    config, processes = configure({"training.local_batch_size": "auto"}), Processes(0, 1, torch.device("cpu"))
    chosen, note = with_local_batch(config, processes, StubPlanner())
    assert chosen.training.local_batch_size == 2
    assert "2 rows at a time, 4 micro-batches" in note
    with pytest.raises(ConfigError, match="not even one row fits"):
        with_local_batch(config, processes, StubPlanner(0))


def test_running_out_of_memory_ends_with_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Trainer):
        def run(self) -> dict[str, Any]:
            raise RuntimeError(ALLOCATION)

    monkeypatch.setattr(launch, "Trainer", Failing)
    loaded = load_config(write_config(tmp_path, "run", tmp_path / "cache"), ["--training.local_batch_size=4"], RunConfig)
    with pytest.raises(OutOfMemory) as caught:
        launch.train(loaded, StubPlanner())
    assert "process 0 of 1 ran out of memory, with 4 rows of 32 tokens" in str(caught.value)
    assert "try training.local_batch_size = 1" in str(caught.value)
    assert (tmp_path / "run" / "out_of_memory.txt").read_text() == str(caught.value) + "\n"


def test_auto_trains_to_the_same_losses(tmp_path: Path) -> None:
    short = ["--training.steps=5", "--validation.enable=false", "--evaluation.enable=false", "--checkpoint.enable=false"]
    for name in ("8", "auto"):
        path = write_config(tmp_path, name, tmp_path / "cache")
        launch.train(load_config(path, [*short, f"--training.local_batch_size={name}"], RunConfig), TracingPlanner())
    assert "local_batch_size = 8" in (tmp_path / "auto" / "config.toml").read_text()
    assert len(losses(tmp_path / "8")) == 5
    assert losses(tmp_path / "auto") == losses(tmp_path / "8")


def test_the_exit_status_is_its_own() -> None:
    assert OUT_OF_MEMORY_STATUS not in (0, 1, 2)
