"""Saved on 4 processes, loaded on 4, 2 and 1."""

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.optim import Optimizer

from tests.checkpoint.common import Net, assert_bitwise, build, checkpointer, state_of, train
from tests.distributed import run_distributed
from titanarch.checkpoint.errors import CheckpointError
from titanarch.checkpoint.store import load
from titanarch.checkpoint.torch_io import LocalWriter
from titanarch.checkpoint.train_state import ModelState, RandomState


def whole(net: Net, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Copies of all tensors of the training state, gathered."""
    found = {name: tensor for entry in state_of(net, optimizers).values() for name, tensor in entry.state_dict().items()}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    return {name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone() for name, value in tensors.items()}


def full(self: LocalWriter, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
    raise OSError(errno.ENOSPC, "No space left on device")


def save_on_four(folder: Path, muon: bool) -> dict[str, Any]:
    """Train 2 steps, save, train 3 more; then resume in place and repeat them."""
    rank, write_data = dist.get_rank(), LocalWriter.write_data
    net, optimizers = build(0, muon=muon)
    train(net, optimizers, start=0, steps=2)
    expected = whole(net, optimizers)
    saver = checkpointer(folder)
    random.seed(rank)
    streams = saver.merge({f"stream-{s}": {"epoch": s, "owner": rank} for s in range(8) if s % 4 == rank})
    state = {**state_of(net, optimizers), "data": {"streams": streams}, "random": RandomState(saver.processes)}
    saver.save(2, state, config_text="x = 1\n")
    drawn = random.random()
    losses = train(net, optimizers, start=2, steps=3)
    saver.wait()

    other, others = build(1, muon=muon)
    random.seed(99)
    data: dict[str, Any] = {}
    saver.load({**state_of(other, others), "data": data, "random": RandomState(saver.processes)})
    assert_bitwise(whole(other, others), expected)
    assert random.random() == drawn
    assert train(other, others, start=2, steps=3) == losses

    with pytest.raises(CheckpointError, match="plain values of data differ between processes"):
        saver.save(3, {"data": {"rank": rank}}, config_text="")
    with pytest.raises(CheckpointError, match="hold different state for 'cursor'"):
        saver.merge({"cursor": rank})
    if rank == 3:  # the disk of one is full: all must know, and nobody waits for it
        LocalWriter.write_data = full  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="step-00000004: the disk is full"):
        saver.save(4, {"model": ModelState(net)}, config_text="", force_sync=True)
    dist.barrier()
    LocalWriter.write_data = write_data  # type: ignore[method-assign]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000002"]
    saver.close()
    return {"losses": losses, "streams": data["streams"], "tensors": expected}


def load_on_fewer(folder: Path, muon: bool) -> dict[str, Any]:
    """Resume and train 3 steps; the generators stay as they are."""
    net, optimizers = build(1, muon=muon)
    saver = checkpointer(folder)
    random.seed(5)
    before = random.getstate()
    data: dict[str, Any] = {"streams": {}}
    loaded = saver.load({**state_of(net, optimizers), "data": data, "random": RandomState(saver.processes)})
    assert loaded is not None
    assert (loaded.step, loaded.world_size, loaded.config) == (2, 4, "x = 1\n")
    assert random.getstate() == before
    tensors = whole(net, optimizers)
    losses = train(net, optimizers, start=2, steps=3)
    saver.close()
    return {"losses": losses, "streams": data["streams"], "tensors": tensors}


def both(function: Callable[[Path, bool], dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """One start of the processes for both choices of the optimizer."""
    return [function(folder / name, name == "muon") for name in ("sgd", "muon")]


def test_a_checkpoint_loads_on_another_number_of_processes(tmp_path: Path) -> None:
    four = run_distributed(both, 4, save_on_four, tmp_path)
    two = run_distributed(both, 2, load_on_fewer, tmp_path)
    one = run_distributed(both, 1, load_on_fewer, tmp_path)
    for case, rel in ((0, 1e-6), (1, 1e-3)):
        expected = four[0][case]
        for result in (*four, *two, *one):
            assert_bitwise(result[case]["tensors"], expected["tensors"])
            assert result[case]["streams"] == {f"stream-{s}": {"epoch": s, "owner": s % 4} for s in range(8)}
            assert result[case]["losses"] == pytest.approx(expected["losses"], rel=rel)

    assert not dist.is_initialized()  # what evaluates may read without any group, into a model that is not sharded
    net = Net()
    loaded = load(tmp_path / "sgd" / "checkpoints", {"model": ModelState(net)})
    assert loaded is not None
    assert loaded.step == 2
    saved = four[0][0]["tensors"]
    assert_bitwise(dict(net.state_dict()), {name: saved[name] for name in net.state_dict()})
