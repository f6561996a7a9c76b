"""The moving average: the chunked scan is the loop over tokens."""

import pytest
import torch

from titanarch.ops.ema_scan import ema_loop, ema_scan


@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (7, 4), (40, 4), (65, 8), (100, 64)])
def test_the_scan_is_the_loop(length: int, chunk: int) -> None:
    """Lengths of less than a chunk, of chunks of chunks, and of no multiple of any."""
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(3, length, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, length, generator=generator, dtype=torch.float64).mul(0.999).add(5e-4).requires_grad_()
    starts = torch.rand(3, length, generator=generator) < 0.1
    out_weights = torch.randn(3, length, 5, generator=generator, dtype=torch.float64)
    found, expected = ema_scan(x, weight, starts, chunk=chunk), ema_loop(x, weight, starts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((y * out_weights).sum(), (x, weight), materialize_grads=True) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_a_certain_weight_where_something_starts_is_finite() -> None:
    """A boundary probability of exactly 1 is what documents begin with."""
    x, weight = torch.randn(1, 6, 2), torch.tensor([[1.0, 0.6, 0.7, 1.0, 0.9, 0.8]], requires_grad=True)
    starts = torch.tensor([[True, False, False, True, False, False]])
    y = ema_scan(x, weight, starts, chunk=2)
    y.sum().backward()
    torch.testing.assert_close(y[:, [0, 3]], x[:, [0, 3]])
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()
    assert weight.grad[0, [0, 3]].tolist() == [0.0, 0.0]


def test_it_computes_in_float32_at_least() -> None:
    x, starts = torch.randn(1, 5, 2, dtype=torch.bfloat16), torch.zeros(1, 5, dtype=torch.bool)
    assert ema_scan(x, torch.full((1, 5), 0.5, dtype=torch.bfloat16), starts).dtype is torch.float32
