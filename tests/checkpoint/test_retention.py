"""Which checkpoints are kept."""

from pathlib import Path

import pytest

from tests.checkpoint.common import checkpointer, filled, names, one_process
from titanarch.checkpoint.marker import Marker
from titanarch.checkpoint.retention import Retention, superfluous

__all__ = ["one_process"]

LOSSES = {10: 3.0, 20: 2.0, 30: None, 40: 2.0, 50: 2.5, 60: None, 70: 4.0}


def removed(latest_k: int = 1, every_n_steps: int = 0, best_k: int = 0) -> list[int]:
    """Steps of seven checkpoints that go."""
    committed = [
        (str(step), Marker.make(step, sequence=i, world_size=1, config="", files={}, validation_loss=loss))
        for i, (step, loss) in enumerate(LOSSES.items())
    ]
    return [int(folder) for folder in superfluous(committed, Retention(latest_k, every_n_steps, best_k))]


def test_three_reasons_to_keep_a_checkpoint() -> None:
    assert removed() == [10, 20, 30, 40, 50, 60]
    assert removed(latest_k=3) == [10, 20, 30, 40]
    assert removed(latest_k=0, best_k=1, every_n_steps=1000) == []
    assert removed(latest_k=100) == []
    assert removed(every_n_steps=30) == [10, 20, 40, 50]
    assert removed(best_k=1) == [10, 30, 40, 50, 60], "of equal losses the older stays"
    assert removed(best_k=3) == [10, 30, 60]
    assert removed(best_k=100) == [30, 60], "where none was measured, none is best"
    assert removed(latest_k=2, every_n_steps=50, best_k=2) == [10, 30]


@pytest.mark.usefixtures("one_process")
def test_a_run_keeps_its_best_and_every_nth(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, keep_latest_k=1, keep_best_k=1, keep_every_n_steps=4)
    for step, loss in {1: 5.0, 2: 1.5, 3: 2.0, 4: None, 5: float("nan"), 6: 3.0, 7: 1.25, 8: 9.0, 9: 8.0}.items():
        saver.save(step, filled(step), config_text="", validation_loss=loss)
        if step == 6:
            saver.wait()
            assert names(tmp_path) == [f"step-0000000{kept}" for kept in (2, 4, 6)]
    saver.close()
    assert names(tmp_path) == [f"step-0000000{kept}" for kept in (4, 7, 8, 9)]
    seconds = [(saved.step, saved.stall_seconds > 0, saved.upload_seconds > 0) for saved in saver.take_saved()]
    assert seconds == [(step, True, True) for step in range(1, 10)]
    assert saver.take_saved() == []
