"""The table of peaks: names as the drivers give them, and figures that must agree with the chips' own arithmetic."""

import pytest
import torch

from titanarch.train.metrics.devices import device_peak, peak_flops_per_second

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("name", "units", "flops_per_unit_and_clock", "megahertz"),
    [
        # Streaming multiprocessors (or compute units) x dense FLOPs a clock in each x boost clock: bf16, fp32 accumulation.
        ("NVIDIA H100 80GB HBM3", 132, 4096, 1830),
        ("NVIDIA H200", 132, 4096, 1830),
        ("NVIDIA H100 PCIe", 114, 4096, 1620),
        ("NVIDIA A100-SXM4-80GB", 108, 2048, 1410),
        ("NVIDIA A10", 72, 1024, 1695),
        ("NVIDIA A30", 56, 2048, 1440),
        ("NVIDIA A40", 84, 1024, 1740),
        ("NVIDIA L4", 58, 1024, 2040),
        ("NVIDIA L40S", 142, 1024, 2520),
        ("NVIDIA RTX 6000 Ada Generation", 142, 1024, 2505),
        ("NVIDIA GeForce RTX 3090", 82, 512, 1695),
        ("NVIDIA GeForce RTX 3090 Ti", 84, 512, 1860),
        ("NVIDIA GeForce RTX 4090", 128, 512, 2520),
        ("NVIDIA GeForce RTX 5090", 170, 512, 2407),
        ("AMD Instinct MI250X", 110, 1024, 1700),
        ("AMD Instinct MI250", 104, 1024, 1700),
        ("AMD Instinct MI300X", 304, 2048, 2100),
        ("AMD Instinct MI350X", 256, 4096, 2200),
        ("AMD Instinct MI355X", 256, 4096, 2400),
    ],
)
def test_bf16_peak_is_units_times_rate_times_clock(name: str, units: int, flops_per_unit_and_clock: int, megahertz: int) -> None:
    peak = peak_flops_per_second(name, BF16, tf32=False)
    assert peak == pytest.approx(units * flops_per_unit_and_clock * megahertz * 1e6, rel=0.015)


def test_types() -> None:
    assert peak_flops_per_second("NVIDIA A100-SXM4-40GB", FP32, tf32=True) == 156e12
    assert peak_flops_per_second("NVIDIA A100-SXM4-40GB", FP32, tf32=False) == 19.5e12
    assert peak_flops_per_second("AMD Instinct MI250X", FP32, tf32=True) == 47.85e12, "no TF32 there"
    assert peak_flops_per_second("Tesla T4", FP16, tf32=False) == 65e12
    assert peak_flops_per_second("Tesla T4", BF16, tf32=False) is None
    assert peak_flops_per_second("NVIDIA H200", torch.float64, tf32=False) is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100X",
        "some CPU",
        "",
    ],
)
def test_a_name_that_only_contains_a_known_one_is_unknown(name: str) -> None:
    assert peak_flops_per_second(name, BF16, tf32=False) is None


def test_neighbours_are_told_apart() -> None:
    peaks = [peak_flops_per_second(f"NVIDIA {name}", BF16, tf32=False) for name in ("A10", "A10G", "L4", "L40", "L40S", "H200 NVL", "H200")]
    assert peaks == [125e12, 70e12, 121e12, 181.05e12, 362.05e12, 835.5e12, 989.4e12]


def test_a_cpu_has_no_peak() -> None:
    assert device_peak(torch.device("cpu"), FP32, tf32=False) is None
