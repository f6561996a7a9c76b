"""Names and contents of what is saved of a model, its optimizers and the random generators."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import SGD, AdamW

from tests.checkpoint.common import assert_bitwise, build, one_process, tensors, train
from titanarch.checkpoint.errors import CheckpointError
from titanarch.checkpoint.processes import Processes
from titanarch.checkpoint.train_state import ModelState, OptimizerState, RandomState
from titanarch.checkpoint.values import decode, encode, flatten, unflatten

__all__ = ["one_process"]
pytestmark = pytest.mark.usefixtures("one_process")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.block = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embedding(tokens)))


def test_names_do_not_tell_how_modules_are_wrapped() -> None:
    bare = Tied()
    wrapped = Tied()
    wrapped.block = torch.compile(checkpoint_wrapper(wrapped.block), backend="eager")  # type: ignore[assignment]
    assert any("_orig_mod" in name for name, _ in wrapped.named_parameters()), "the test wraps nothing"
    assert set(ModelState(wrapped).state_dict()) == set(bare.state_dict())

    def names(model: nn.Module) -> set[str]:
        return set(OptimizerState(model, [AdamW(model.parameters())]).state_dict())

    assert names(wrapped) == names(bare)
    ModelState(bare).load_state_dict(ModelState(wrapped).state_dict())
    ModelState(wrapped).load_state_dict(ModelState(bare).state_dict())
    assert torch.equal(bare.block.weight, dict(wrapped.named_parameters())["block._orig_mod._checkpoint_wrapped_module.weight"])


def test_tied_weights_stay_tied() -> None:
    first, second = Tied(), Tied()
    optimizers = [AdamW(model.parameters()) for model in (first, second)]
    first(torch.arange(5)).sum().backward()
    optimizers[0].step()
    ModelState(second).load_state_dict(ModelState(first).state_dict())
    OptimizerState(second, optimizers[1:]).load_state_dict(OptimizerState(first, optimizers[:1]).state_dict())
    assert second.head.weight is second.embedding.weight
    assert torch.equal(first.head.weight, second.head.weight)
    moments = [optimizer.state[model.head.weight]["exp_avg"] for model, optimizer in zip((first, second), optimizers, strict=True)]
    assert torch.equal(*moments)


def test_looking_at_a_fresh_optimizer_does_not_change_training() -> None:
    untouched, touched = build(0), build(0)
    OptimizerState(*touched).state_dict()
    assert train(*untouched, start=0, steps=3) == train(*touched, start=0, steps=3)
    assert_bitwise(tensors(*untouched), tensors(*touched))


def test_a_loaded_optimizer_keeps_its_own_implementation() -> None:
    model = nn.Linear(2, 2)
    saved = OptimizerState(model, [AdamW(model.parameters(), lr=0.5, fused=True)]).state_dict()
    other = AdamW(model.parameters(), lr=0.1, foreach=False)
    OptimizerState(model, [other]).load_state_dict(saved)
    group = other.param_groups[0]
    assert (group["lr"], group["fused"], group["foreach"]) == (0.5, None, False)


def test_another_optimizer_is_refused() -> None:
    model = nn.Linear(2, 2)
    saved = OptimizerState(model, [SGD(model.parameters(), lr=0.5)]).state_dict()
    with pytest.raises(CheckpointError, match=r"missing there \['param_groups.bias.amsgrad'"):
        OptimizerState(model, [AdamW(model.parameters())]).load_state_dict(saved)


def test_generators_continue_where_they_were() -> None:
    state = RandomState(Processes.__new__(Processes))
    state.processes.distributed, state.processes.rank, state.processes.count = False, 0, 1

    def draw() -> tuple[object, ...]:
        legacy = float(np.random.randn()), float(np.random.rand())  # noqa: NPY002 - the global generator is meant
        return random.random(), random.gauss(0, 1), *legacy, torch.rand(3).tolist()

    random.gauss(0, 1)
    np.random.randn()  # noqa: NPY002 - both leave half of a pair behind
    saved = unflatten(decode(encode(flatten(state.state_dict()))))
    first = draw()
    state.load_state_dict(saved)
    assert draw() == first
    state.load_state_dict({"processes": saved["processes"] | {"000001": {}}})  # saved by two: this one goes on
    assert draw() != first
