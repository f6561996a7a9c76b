"""Clipping and loss scaling on one process."""

import math

import pytest
import torch
from torch import Tensor, nn

from titanarch.train.gradients import GradientClipper, LossScaler
from titanarch.train.guard import BadGradientsConfig, GradientGuard

SHAPES = [(5, 3), (7,), (1,), (2, 2, 2)]


def parameters(scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    held = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for parameter in held:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    return held


def gradients(held: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in held if p.grad is not None]


@pytest.mark.parametrize("max_norm", [0.5, 1e9, math.inf])
@pytest.mark.parametrize("divide_by", [1.0, 1024.0])
def test_clip_is_torchs(max_norm: float, divide_by: float) -> None:
    held, reference = parameters(divide_by), parameters()
    expected = torch.nn.utils.clip_grad_norm_(reference, max_norm)
    norm = GradientClipper(held, max_norm).clip(divide_by)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(held), gradients(reference), rtol=1e-6, atol=0)
    assert norm.dtype == torch.float32
    assert norm.shape == ()


def test_clip_leaves_small_gradients_bitwise() -> None:
    held = parameters()
    GradientClipper(held, 1e9).clip()
    assert all(torch.equal(a, b) for a, b in zip(gradients(held), gradients(parameters()), strict=True))


def test_clip_measures_low_precision_in_fp32() -> None:
    parameter = nn.Parameter(torch.zeros(10_000, dtype=torch.bfloat16))
    parameter.grad = torch.full_like(parameter, 0.01)
    expected = parameter.grad.double().norm().item()
    assert GradientClipper([parameter], math.inf).clip().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(65_537,), (2049, 2047), (3, 1 << 21)])
def test_clip_measures_large_gradients_exactly(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """One running sum is 8e-5 off here."""
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = parameter.grad.double().norm().item()
    assert GradientClipper([parameter], math.inf).clip().item() == pytest.approx(expected, rel=1e-6)


def test_clip_without_gradients() -> None:
    held = parameters()
    held[0].grad = None
    expected = math.sqrt(sum(g.double().square().sum().item() for g in gradients(held)))
    assert GradientClipper(held, 1.0).clip().item() == pytest.approx(expected, rel=1e-6)
    assert GradientClipper([nn.Parameter(torch.zeros(3))], 1.0).clip().item() == 0.0


def test_scaler_follows_torchs_grad_scaler() -> None:
    """The same overflows give the same scales as torch's own, over growth and back-off."""
    reference = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaler = LossScaler(enabled=True)
    parameter = nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=0.0)
    overflows = {3, 4, 2010, 4100, 4101}
    for step in range(4200):
        parameter.grad = torch.full((1,), math.inf if step in overflows else 1.0)
        reference.scale(torch.zeros(()))
        reference.step(sgd)
        reference.update()
        assert scaler.update(finite=step not in overflows) == (step in overflows)
        assert scaler.scale == reference.get_scale(), step
    assert scaler.overflows == len(overflows)

    again = LossScaler(enabled=True)
    again.load_state_dict(scaler.state_dict())
    for _ in range(2000):
        scaler.update(finite=True)
        again.update(finite=True)
    assert again.state_dict() == scaler.state_dict()
    assert again.scale > reference.get_scale()


def test_disabled_scaler_does_nothing() -> None:
    scaler = LossScaler(enabled=False)
    assert scaler.update(finite=False) is False
    scaler.load_state_dict({"scale": 8.0, "good_steps": 1, "overflows": 1})
    assert scaler.state_dict() == {"scale": 1.0, "good_steps": 0, "overflows": 0}


def test_half_precision_training_end_to_end() -> None:
    """With its scale folded into clipping, a scaled loss gives the parameters that an unscaled one gives."""
    weights = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = LossScaler(enabled=scaled)
        clipper, guard = GradientClipper(model.parameters(), 0.5), GradientGuard(BadGradientsConfig(), scaler)
        for step in range(5):
            loss = model(torch.ones(2, 8) * (step + 1)).square().mean()
            (loss * scaler.scale).backward()
            norm = clipper.clip(divide_by=scaler.scale)
            if guard.admits(step, loss, norm):
                sgd.step()
            sgd.zero_grad()
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_clip_and_guard_do_not_wait_for_the_gpu() -> None:
    held, reference = [nn.Parameter(p.detach().cuda()) for p in parameters()], parameters(64.0)
    for parameter, cpu in zip(held, reference, strict=True):
        assert cpu.grad is not None
        parameter.grad = cpu.grad.cuda()
    clipper, guard = GradientClipper(held, 0.5), GradientGuard(BadGradientsConfig(), LossScaler(enabled=False))
    loss = torch.tensor(1.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = clipper.clip()
        admitted = guard.admits(0, loss, norm)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert admitted
    expected = torch.nn.utils.clip_grad_norm_(reference, 0.5)
    torch.testing.assert_close(norm.cpu(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close([g.cpu() for g in gradients(held)], gradients(reference), rtol=1e-6, atol=0)
    guard.check()
