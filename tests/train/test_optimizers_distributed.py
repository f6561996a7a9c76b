"""Optimizers, clipping, budgets and seeds on several processes equal one process."""

import time
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.distributed import run_distributed
from titanarch.contract.roles import VECTOR, Role, roles_of
from titanarch.train.budget import SECONDS_BETWEEN_AGREEMENTS, Stopwatch, TimeBudget
from titanarch.train.gradients import GradientClipper, LossScaler
from titanarch.train.guard import BadGradientsConfig, GradientGuard
from titanarch.train.optimizers import AdamConfig, AdamWConfig, MuonConfig, OptimizerConfig, SGDConfig, build_optimizers
from titanarch.train.reproducibility import resolve_seed

CONFIGS: dict[str, OptimizerConfig] = {
    "AdamW": AdamWConfig(lr=0.05, weight_decay=0.3),
    "AdamW foreach": AdamWConfig(lr=0.05, weight_decay=0.3, implementation="foreach"),
    "Adam": AdamConfig(lr=0.05, weight_decay=0.3),
    "SGD": SGDConfig(lr=0.05, momentum=0.9, weight_decay=0.3),
    "Muon": MuonConfig(lr=0.05, adamw_lr=0.05),
}
MAX_NORM = 0.1


class Net(nn.Module):
    """Has rows that two processes share unevenly, and a parameter that only one of them holds."""

    roles: ClassVar[dict[str, Role]] = {"scale": VECTOR}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 7)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.down(self.up(x).relu()) * self.scale).square().mean()


def train(model: nn.Module, config: OptimizerConfig) -> dict[str, Any]:
    """Four clipped steps on the same batch everywhere; whole parameters and the norms."""
    roles = roles_of(model)
    optimizers = build_optimizers(config, model.named_parameters(), roles)
    clipper = GradientClipper(model.parameters(), MAX_NORM)
    norms = []
    for step in range(4):
        optimizers.set_lr(1 / (step + 1))
        model(torch.randn(3, 6, generator=torch.Generator().manual_seed(step))).backward()
        norms.append(clipper.clip().item())
        optimizers.step()
        optimizers.zero_grad()
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in sorted(model.named_parameters(), key=lambda named: named[0])
    }
    return {**weights, "norms": norms}


def sharded_losses() -> dict[str, dict[str, Any]]:
    found = {}
    for name, config in CONFIGS.items():
        model = Net()
        fully_shard(model)
        found[name] = train(model, config)
    return found


def skipped_alike() -> list[bool]:
    """Only process 0 holds the gradient that is not a number, and all refuse the step."""
    model = Net()
    fully_shard(model)
    guard = GradientGuard(BadGradientsConfig(nonfinite="skip"), LossScaler(enabled=False))
    clipper = GradientClipper(model.parameters(), MAX_NORM)
    admitted = []
    for step in range(3):
        model(torch.ones(3, 6)).backward()
        scale = model.scale.grad
        assert isinstance(scale, DTensor)
        if step == 1 and scale.to_local().numel():
            scale.to_local().fill_(torch.nan)
        admitted.append(guard.admits(step, torch.tensor(1.0), clipper.clip()))
        model.zero_grad()
    return [*admitted, scale.to_local().numel() == 1]


def timed() -> tuple[list[float], int]:
    """A budget of 1.2 seconds, where process 1's own clock is of no account; how often the processes talked."""
    n_agreements = 0

    class Counted(TimeBudget):
        def _agree(self, step: int) -> None:
            nonlocal n_agreements
            n_agreements += 1
            super()._agree(step)

    budget = Counted(1.2, Stopwatch() if dist.get_rank() == 0 else Stopwatch(lambda: 1e9 * torch.rand(()).item()))
    budget.start(0, 0)
    fractions, step = [], 0
    while not budget.done:
        time.sleep(0.01)
        step += 1
        budget.advance(step, 0)
        fractions.append(budget.fraction)
    return fractions, n_agreements


def on_two() -> dict[str, Any]:
    fractions, n_agreements = timed()
    return {
        "fractions": fractions,
        "n_agreements": n_agreements,
        "losses": sharded_losses(),
        "skipped": skipped_alike(),
        "seed": resolve_seed(None, torch.device("cpu")),
    }


def on_four() -> dict[str, dict[str, Any]]:
    """FSDP over tensor parallelism, so that parameters lie on two meshes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    found = {}
    for name, config in CONFIGS.items():
        model = Net()
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp_shard"])
        found[name] = train(model, config)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {name: train(Net(), config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_distributed(on_two, 2)


def assert_same_training(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert expected["norms"][0] > 2 * MAX_NORM, "clipping must bite"
    for name in expected.keys() - {"norms"}:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_train_like_one(name: str, alone: dict[str, dict[str, Any]], two: list[dict[str, Any]]) -> None:
    for result in two:
        assert_same_training(result["losses"][name], alone[name])


def test_two_processes_skip_alike(two: list[dict[str, Any]]) -> None:
    assert [result["skipped"][:3] for result in two] == [[True, False, True]] * 2
    assert sorted(result["skipped"][3] for result in two) == [False, True]


def test_two_processes_keep_time_alike(two: list[dict[str, Any]]) -> None:
    first, second = two
    assert first["fractions"] == second["fractions"]
    assert first["fractions"] == sorted(first["fractions"])
    assert first["fractions"][-1] == 1.0
    assert first["n_agreements"] <= 5 + 4 * 1.2 / SECONDS_BETWEEN_AGREEMENTS < len(first["fractions"])


def test_two_processes_draw_one_seed(two: list[dict[str, Any]]) -> None:
    assert two[0]["seed"] == two[1]["seed"]


def test_fsdp_over_tensor_parallelism_trains_like_one(alone: dict[str, dict[str, Any]]) -> None:
    for result in run_distributed(on_four, 4):
        for name in CONFIGS:
            assert_same_training(result[name], alone[name])
