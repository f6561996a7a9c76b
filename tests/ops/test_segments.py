"""Recurrences over long rows, a segment at a time, are those over whole rows."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titanarch.ops import decay_recurrence as decay_module
from titanarch.ops import delta_recurrence as delta_module
from titanarch.ops.segments import in_segments

B, T, H, K, V = 2, 150, 2, 4, 6
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "scalar decay": ((H, K), (H, K), (H, V), (H,)),
    "vector decay": ((H, K), (H, K), (H, V), (H, K)),
    "delta rule": ((H, K), (H, K), (H, V), (H, K), (H,)),
    "low rank": ((H, K), (H, K), (H, V), (H, K), (H, K), (H, K)),
}
OPS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "scalar decay": decay_module.decay_recurrence,
    "vector decay": decay_module.decay_recurrence,
    "delta rule": delta_module.delta_rule,
    "low rank": delta_module.diagonal_plus_low_rank,
}


def inputs_of(name: str) -> list[Tensor]:
    torch.manual_seed(0)
    drawn = [torch.randn(B, T, *shape, dtype=torch.float64) for shape in SHAPES[name]]
    drawn[3] = -F.softplus(drawn[3])
    if name == "low rank":
        drawn[4] = F.normalize(drawn[4], dim=-1)
        drawn[5] = -drawn[4]
    if name == "delta rule":
        drawn[1], drawn[4] = F.normalize(drawn[1], dim=-1), drawn[4].sigmoid()
    return [x.requires_grad_() for x in drawn]


def results(name: str, n_tokens: int, monkeypatch: pytest.MonkeyPatch, *, packed: bool) -> list[Tensor]:
    """Outputs, last state and all gradients, in segments of ``n_tokens``."""
    for module in (decay_module, delta_module):
        monkeypatch.setattr(module, "in_segments", lambda *args, **options: in_segments(*args, **options, n_tokens=n_tokens))
    inputs, starts = inputs_of(name), torch.zeros(B, T, dtype=torch.bool)
    starts[:, [0, 64, 90]] = True
    y, last = OPS[name](*inputs, starts_BT=starts if packed else None, state=None)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y, last, *torch.autograd.grad((y * weights).sum() + last.square().sum(), inputs)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", list(OPS))
def test_segments_change_nothing(monkeypatch: pytest.MonkeyPatch, name: str, packed: bool) -> None:
    whole = results(name, T, monkeypatch, packed=packed)
    for n_tokens in (64, 50):  # the last one cuts chunks
        for found, expected in zip(results(name, n_tokens, monkeypatch, packed=packed), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
