"""A mixture of experts on two processes against one: auxiliary losses count once, and the bias of the choice sees all tokens."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import run_distributed
from tests.parallel.divided import divided_decoder
from tests.parallel.steps import ROWS, T, V, rows, whole
from titanarch.models.channels.moe import MoE

WEIGHT = 1.0
"""Of the auxiliary losses: as large as the loss itself, so that a factor in their gradient shows."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "data": {"data_parallel_shard_degree": 2},
    "replicas": {"data_parallel_replicate_degree": 2},
    "tensor": {"tensor_parallel_degree": 2},
    "tensor, no sequence parallelism": {"tensor_parallel_degree": 2, "enable_sequence_parallel": False},
    "context": {"context_parallel_degree": 2},
}


@dataclass
class Outcome:
    """``aux``: each term, over all processes. ``gradients``: of the first step, whole. ``biases``: of each layer after all steps."""

    aux: dict[str, float]
    gradients: dict[str, Tensor]
    biases: list[Tensor]


def model_table(over: str) -> dict[str, Any]:
    experts = {"n_experts": 6, "top_k": 2, "d_ff": 16, "n_shared": 1, "balance_over": over, "bias_rate": 0.01}
    losses = {"balance_weight": WEIGHT, "z_weight": WEIGHT}
    return {
        "n_layers": 3,
        "d_model": 16,
        "n_heads": 2,
        "channel": "mlp",
        "channel_layers": ["moe", "channel"],
        "channels": {"moe": {**experts, **losses}},
        "position": {"relative": "rotary"},
        "init": {"std": 0.3},
    }


def train(over: str, parallelism: dict[str, Any]) -> Outcome:
    """Three steps as the trainer makes them."""
    model, mesh = divided_decoder(model_table(over), vocab_size=V, seq_len=T, parallelism=parallelism)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    degrees = mesh.degrees
    n = degrees.data_parallel
    here = slice(mesh.data_rank * ROWS // n, (mesh.data_rank + 1) * ROWS // n)
    outcome = Outcome({}, {}, [])
    for step in range(3):
        tokens, seq, labels = rows(step)
        own = replace(seq, position_BT=seq.position_BT[here], document_BT=seq.document_BT[here], row_B=seq.row_B[here])
        objective = model(tokens[here], own, labels[here])
        loss = objective.total / (ROWS * T)
        for aux in objective.aux.values():
            loss = loss + aux.weight * aux.total / aux.counted / (n * degrees.cp)
        loss.backward()
        if step == 0:
            for name, aux in objective.aux.items():
                value = (aux.total / aux.counted).detach() / degrees.world_size
                dist.all_reduce(value)
                outcome.aux[name] = value.item()
            outcome.gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        model.after_update()
        optimizer.zero_grad()
    outcome.biases = [module.bias_E.clone() for module in model.modules() if isinstance(module, MoE)]
    return outcome


def train_all(names: list[str]) -> dict[tuple[str, str], Outcome]:
    return {(over, name): train(over, LAYOUTS[name]) for over in ("row", "batch") for name in names}


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], Outcome]:
    return run_distributed(train_all, 1, ["one"])[0]


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[tuple[str, str], Outcome]]:
    return run_distributed(train_all, 2, [name for name in LAYOUTS if name != "one"])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
@pytest.mark.parametrize("over", ["row", "batch"])
def test_two_processes_equal_one(
    alone: dict[tuple[str, str], Outcome], two_ranks: list[dict[tuple[str, str], Outcome]], over: str, layout: str
) -> None:
    expected = alone[over, "one"]
    for ranks in two_ranks:
        found = ranks[over, layout]
        assert found.gradients.keys() == expected.gradients.keys()
        for name, value in expected.gradients.items():
            assert (found.gradients[name] - value).abs().max() / value.abs().max() < 2e-5, name
        for name in ("moe_balance", "moe_z", "moe_dropped"):
            assert found.aux[name] == pytest.approx(expected.aux[name], rel=1e-5), name
        assert len(expected.biases) == 2
        for bias, other in zip(expected.biases, found.biases, strict=True):
            assert bias.abs().max() == pytest.approx(0.03, rel=0.7)
            assert torch.equal(bias, other)
