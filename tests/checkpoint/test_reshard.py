"""Saved on 4 processes, loaded on 4, 2 and 1."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.checkpoint.common import assert_bitwise, build, checkpointer, state_of, tensors, train
from tests.distributed import run_distributed
from titanarch.checkpoint.errors import CheckpointError
from titanarch.checkpoint.train_state import RandomState


def save_on_four(folder: Path) -> dict[str, Any]:
    """Train 2 steps, save, train 3 more; then resume in place and repeat them."""
    rank = dist.get_rank()
    net, optimizers = build(0)
    train(net, optimizers, start=0, steps=2)
    expected = tensors(net, optimizers)
    saver = checkpointer(folder)
    random.seed(rank)
    streams = saver.merge({f"stream-{s}": {"epoch": s, "owner": rank} for s in range(8) if s % 4 == rank})
    state = {**state_of(net, optimizers), "data": {"streams": streams}, "random": RandomState(saver.processes)}
    saver.save(2, state, config_text="x = 1\n")
    drawn = random.random()
    losses = train(net, optimizers, start=2, steps=3)
    saver.wait()

    other, others = build(1)
    random.seed(99)
    data: dict[str, Any] = {}
    saver.load({**state_of(other, others), "data": data, "random": RandomState(saver.processes)})
    assert_bitwise(tensors(other, others), expected)
    assert random.random() == drawn
    assert train(other, others, start=2, steps=3) == losses

    with pytest.raises(CheckpointError, match="plain values of data differ between processes"):
        saver.save(3, {"data": {"rank": rank}}, config_text="")
    with pytest.raises(CheckpointError, match="hold different state for 'cursor'"):
        saver.merge({"cursor": rank})
    saver.close()
    return {"losses": losses, "streams": data["streams"]}


def load_on_fewer(folder: Path) -> dict[str, Any]:
    """Resume and train 3 steps; the generators stay as they are."""
    net, optimizers = build(1)
    saver = checkpointer(folder)
    random.seed(5)
    before = random.getstate()
    data: dict[str, Any] = {"streams": {}}
    loaded = saver.load({**state_of(net, optimizers), "data": data, "random": RandomState(saver.processes)})
    assert loaded is not None
    assert (loaded.step, loaded.world_size, loaded.config) == (2, 4, "x = 1\n")
    assert random.getstate() == before
    losses = train(net, optimizers, start=2, steps=3)
    saver.close()
    return {"losses": losses, "streams": data["streams"]}


def test_a_checkpoint_loads_on_another_number_of_processes(tmp_path: Path) -> None:
    four = run_distributed(save_on_four, 4, tmp_path)
    for results in (run_distributed(load_on_fewer, 2, tmp_path), run_distributed(load_on_fewer, 1, tmp_path)):
        for result in results:
            assert result["losses"] == pytest.approx(four[0]["losses"], rel=1e-6)
    assert four[0]["streams"] == results[0]["streams"] == {f"stream-{s}": {"epoch": s, "owner": s % 4} for s in range(8)}
    assert all(result["losses"] == four[0]["losses"] for result in four)
