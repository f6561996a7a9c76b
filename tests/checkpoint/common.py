"""What the checkpoint tests share: a process group of one, and a small model with its optimizers."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW, Muon, Optimizer

from titanarch.checkpoint.config import CheckpointConfig
from titanarch.checkpoint.marker import MARKER
from titanarch.checkpoint.store import Checkpointer
from titanarch.checkpoint.train_state import ModelState, OptimizerState

WIDTH = 16


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """torch.distributed with this process alone."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Net(nn.Module):
    """Two hidden layers with a norm between; 3 sizes of parameters, matrices and vectors."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, 4)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(self.norm(self.first(x)))) * self.scale[0])


def build(seed: int, *, width: int = WIDTH, muon: bool = True) -> tuple[Net, list[Optimizer]]:
    """A sharded net, and two optimizers: AdamW for its vectors, and Muon or SGD for its matrices.

    Muon's bf16 iteration turns a gradient's last bit into 1e-3 of its step, so losses agree tightly only without it.
    """
    torch.manual_seed(seed)
    net = Net(width)
    for child in (net.first, net.second, net.head):
        fully_shard(child)
    fully_shard(net)
    matrices = [net.first.weight, net.second.weight]
    others = [p for p in net.parameters() if all(p is not m for m in matrices)]
    second = Muon(matrices, lr=2e-2, weight_decay=0.1) if muon else SGD(matrices, lr=2e-2, momentum=0.9)
    return net, [AdamW(others, lr=1e-2, weight_decay=0.1), second]


def train(net: Net, optimizers: list[Optimizer], *, start: int, steps: int) -> list[float]:
    """Global losses of ``steps`` steps on rows that depend on the step alone; 8 rows, split over the processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 8, generator=generator)[rank::world]
        y = torch.randn(8, 4, generator=generator)[rank::world]
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / world)
    return losses


def state_of(net: Net, optimizers: list[Optimizer]) -> dict[str, ModelState | OptimizerState]:
    return {"model": ModelState(net), "optimizer": OptimizerState(net, optimizers)}


def checkpointer(run_folder: Path | str, **options: object) -> Checkpointer:
    return Checkpointer(CheckpointConfig.model_validate({"interval": 1, **options}), run_folder)


def tensors(net: Net, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Copies of all local tensors of the training state."""
    found = {f"model.{name}": value for name, value in net.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, buffers in enumerate(optimizer.state.values()):
            found |= {f"optimizer.{number}.{index}.{key}": value for key, value in buffers.items()}
    return {name: (value.to_local() if hasattr(value, "to_local") else value).detach().clone() for name, value in found.items()}


def assert_bitwise(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing


def filled(value: float, size: int = 1000) -> dict[str, Any]:
    """A state whose every number is ``value``."""
    return {"model": {"w": torch.full((size,), float(value)), "b": torch.full((3, 5), float(value))}, "data": {"step": value}}


def save_steps(folder: Path, steps: list[int], **options: object) -> None:
    saver = checkpointer(folder, **options)
    for step in steps:
        saver.save(step, filled(step), config_text="[training]")
    saver.close()


def assert_filled(state: dict[str, Any], value: float) -> None:
    assert state["data"] == {"step": value}
    assert all(bool((tensor == value).all()) for tensor in state["model"].values())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def digests(folder: Path) -> dict[str, dict[str, int | str]]:
    """What a marker has to say of the files of a checkpoint, read from the disk."""
    content = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MARKER}
    return {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in sorted(content.items())}
