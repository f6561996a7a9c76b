"""Norms by layer of the last steps, against those of the gradients themselves."""

import json
import math

import pytest
import torch
from torch import Tensor, nn

from titanarch.train.gradients import GradientClipper
from titanarch.train.guard import HISTORY_STEPS, MOST_UNCHECKED_STEPS
from titanarch.train.layer_norms import LayerNorms


class Net(nn.Module):
    """Three layers, of which one has two parameters and one sits last in its parent's own order."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2, bias=False)])


LAYER_OF = {"embedding.weight": "embedding", "layers.0.weight": "layers.0", "layers.0.bias": "layers.0", "layers.1.weight": "layers.1"}


def gradients(net: Net, step: int, *, without: str = "") -> dict[str, float]:
    """Give every parameter but ``without`` a gradient; the norms by layer, in fp64."""
    generator = torch.Generator().manual_seed(step)
    squares = dict.fromkeys(LAYER_OF.values(), 0.0)
    for name, parameter in net.named_parameters():
        grad: Tensor = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if name == without else grad
        squares[LAYER_OF[name]] += 0.0 if name == without else grad.double().square().sum().item()
    return {layer: math.sqrt(square) for layer, square in squares.items()}


def test_the_last_fifty_steps_by_layer() -> None:
    """Clipped or not, with a scaled loss or a parameter that had no gradient; what is left of a restart is the same."""
    net = Net()
    clipper = GradientClipper(net.parameters(), 0.5)
    norms, again = LayerNorms(net, clipper), LayerNorms(net, clipper)
    expected = {}
    for step in range(1, HISTORY_STEPS + 8):
        expected[step] = gradients(net, step, without="layers.0.bias" if step % 3 == 0 else "")
        scale = 1024.0 if step % 2 else 1.0
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        clipper.clip(scale)
        norms.add(step, scale)
        again.add(step, scale)
        if step == 30:
            restarted = LayerNorms(net, clipper)
            restarted.load_state_dict(json.loads(json.dumps(again.state_dict(), allow_nan=False)))
            again = restarted
    for found in (norms.last(), again.last()):
        assert [step for step, _ in found] == list(range(8, HISTORY_STEPS + 8))
        for step, by_layer in found:
            assert list(by_layer) == ["embedding", "layers.0", "layers.1"]
            assert by_layer == pytest.approx(expected[step], rel=1e-5)
    assert [step for step, _ in norms.last(until=20)] == list(range(1, 21)), "a step that is found late has those before it"


def test_what_is_not_finite_is_told_and_kept() -> None:
    net = Net()
    clipper = GradientClipper(net.parameters(), 1.0)
    norms = LayerNorms(net, clipper)
    gradients(net, 1)
    assert net.layers[1].weight.grad is not None
    net.layers[1].weight.grad[0, 0] = torch.nan
    clipper.clip()
    norms.add(1, 1.0)
    again = LayerNorms(net, clipper)
    again.load_state_dict(json.loads(json.dumps(norms.state_dict(), allow_nan=False)))
    for each in (norms, again):
        ((_, by_layer),) = each.last()
        assert [layer for layer, norm in by_layer.items() if not math.isfinite(norm)] == ["layers.1"]
    other = LayerNorms(nn.Linear(2, 2), GradientClipper([], 1.0))
    other.load_state_dict(norms.state_dict())
    assert other.last() == [], "of another model's layers nothing is kept"


def test_a_step_reads_nothing_from_an_accelerator() -> None:
    """On the meta device, where a tensor has no numbers, reading one raises."""
    net = Net().to("meta")
    clipper = GradientClipper(net.parameters(), 1.0)
    norms = LayerNorms(net, clipper)
    for step in range(2 * MOST_UNCHECKED_STEPS):
        for parameter in net.parameters():
            parameter.grad = torch.empty_like(parameter)
        clipper.clip()
        norms.add(step, 1.0)
    with pytest.raises((RuntimeError, NotImplementedError)):
        norms.last()
