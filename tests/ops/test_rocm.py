"""What is otherwise on ROCm, on a torch that says it is built for it."""

import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend

from titanarch.ops import rocm
from titanarch.train.metrics.devices import peak_flops_per_second


@pytest.mark.parametrize("hip", [None, "6.4.43482"])
def test_no_cudnn_attention_on_rocm(monkeypatch: pytest.MonkeyPatch, hip: str | None) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    assert rocm.is_rocm() is (hip is not None)
    backends = rocm.attention_backends()
    assert (SDPBackend.CUDNN_ATTENTION in backends) is (hip is None)
    assert backends[-3:] == [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@pytest.mark.parametrize(
    ("architecture", "fnuz"),
    [("gfx942:sramecc+:xnack-", True), ("gfx950:sramecc+:xnack-", False), ("gfx90a", False), ("gfx1201", False), (None, False)],
)
def test_float8_formats(architecture: str | None, fnuz: bool) -> None:
    """The largest values tell the formats apart: 240 and 57,344 with one more exponent step, 448 and 57,344 without."""
    forward, backward = rocm.float8_formats(architecture)
    assert torch.finfo(forward).max == (240.0 if fnuz else 448.0)
    assert (torch.finfo(backward).max, torch.finfo(backward).tiny) == (57344.0, 2.0**-15 if fnuz else 2.0**-14)


def test_aotriton_is_switched_on_where_it_is_experimental() -> None:
    environment: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for architecture in ("gfx90a:sramecc+:xnack-", "gfx942:sramecc+:xnack-"):
            rocm.prepare(architecture, environment)
    assert environment == {}
    with pytest.warns(UserWarning, match="attention on gfx1100 uses AOTriton's kernels, which are experimental there; TORCH_ROCM_"):
        rocm.prepare("gfx1100", environment)
    assert environment == {"TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL": "1"}


def test_the_user_may_leave_aotriton_off() -> None:
    environment = {"TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL": "0"}
    rocm.prepare("gfx1100", environment)
    assert environment == {"TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL": "0"}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("AMD Instinct MI250X", 383.0 / 2),
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI325X", 1307.4),
        ("AMD Instinct MI300X VF", 1307.4),
    ],
)
def test_peaks(name: str, tflops: float) -> None:
    """Of a torch device: one of the MI250X's two dies."""
    assert peak_flops_per_second(name, torch.bfloat16, tf32=False) == tflops * 1e12


def test_tf32_is_of_mi300_alone() -> None:
    assert peak_flops_per_second("AMD Instinct MI300X", torch.float32, tf32=True) == 653.7e12
    assert peak_flops_per_second("AMD Instinct MI250X", torch.float32, tf32=True) == 47.85e12
