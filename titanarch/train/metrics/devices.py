"""Peak FLOP/s of accelerators, dense (without 2:4 sparsity), tensor or matrix cores with fp32 accumulation.

Sources, all makers' own documents; where one lists sparse rates, half of them is taken:
NVIDIA data sheets of B200 (HGX) and GB200, H200 and H200 NVL, H100 (SXM, PCIe, NVL), GH200, A100, A30, A40, A10, L4, L40,
L40S, T4, V100, RTX A6000 and RTX 6000 Ada; NVIDIA white papers "Ampere GA102", "Ada GPU Architecture" and
"RTX Blackwell GPU Architecture" (GeForce: FP16 and BF16 with FP32 accumulate); Amazon's and NVIDIA's sheet of the A10G.
AMD's figures stand in ``titanarch.ops.rocm``.
"""

import re
from dataclasses import dataclass

import torch

from titanarch.ops.rocm import PEAK_TFLOPS

TERA = 1e12


@dataclass(frozen=True)
class Peak:
    """TFLOP/s by type; None where the device has no such units. ``fp32`` is without TF32."""

    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float


H100_SXM = Peak(bf16=989.4, fp16=989.4, tf32=494.7, fp32=66.9)
HOPPER_NVL = Peak(bf16=835.5, fp16=835.5, tf32=417.5, fp32=60.0)
A100 = Peak(bf16=312.0, fp16=312.0, tf32=156.0, fp32=19.5)

PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"NVIDIA GB200", Peak(bf16=2500.0, fp16=2500.0, tf32=1250.0, fp32=80.0)),
    (r"NVIDIA B200", Peak(bf16=2250.0, fp16=2250.0, tf32=1125.0, fp32=75.0)),
    (r"NVIDIA GH200( \d+GB)?", H100_SXM),
    (r"NVIDIA H200 NVL", HOPPER_NVL),
    (r"NVIDIA H200", H100_SXM),
    (r"NVIDIA H100 NVL", HOPPER_NVL),
    (r"NVIDIA H[18]00 PCIe", Peak(bf16=756.0, fp16=756.0, tf32=378.0, fp32=51.0)),
    (r"NVIDIA H[18]00( \d+GB HBM\d)?", H100_SXM),
    (r"(NVIDIA )?A[18]00-(SXM4|PCIE|SXM)-\d+GB|NVIDIA A[18]00 80GB PCIe", A100),
    (r"NVIDIA A30", Peak(bf16=165.0, fp16=165.0, tf32=82.0, fp32=10.3)),
    (r"NVIDIA A40", Peak(bf16=149.7, fp16=149.7, tf32=74.8, fp32=37.4)),
    (r"NVIDIA A10", Peak(bf16=125.0, fp16=125.0, tf32=62.5, fp32=31.2)),
    (r"NVIDIA A10G", Peak(bf16=70.0, fp16=70.0, tf32=35.0, fp32=31.5)),
    (r"NVIDIA L4", Peak(bf16=121.0, fp16=121.0, tf32=60.0, fp32=30.3)),
    (r"NVIDIA L40", Peak(bf16=181.05, fp16=181.05, tf32=90.5, fp32=90.5)),
    (r"NVIDIA L40S", Peak(bf16=362.05, fp16=362.05, tf32=183.0, fp32=91.6)),
    (r"(NVIDIA )?RTX A6000", Peak(bf16=154.8, fp16=154.8, tf32=77.4, fp32=38.7)),
    (r"NVIDIA RTX 6000 Ada Generation", Peak(bf16=364.25, fp16=364.25, tf32=182.1, fp32=91.1)),
    (r"NVIDIA GeForce RTX 3090", Peak(bf16=71.0, fp16=71.0, tf32=35.6, fp32=35.6)),
    (r"NVIDIA GeForce RTX 3090 Ti", Peak(bf16=80.0, fp16=80.0, tf32=40.0, fp32=40.0)),
    (r"NVIDIA GeForce RTX 4090", Peak(bf16=165.2, fp16=165.2, tf32=82.6, fp32=82.6)),
    (r"NVIDIA GeForce RTX 5090", Peak(bf16=209.5, fp16=209.5, tf32=104.8, fp32=104.8)),
    (r"Tesla V100-SXM2-\d+GB", Peak(bf16=None, fp16=125.0, tf32=None, fp32=15.7)),
    (r"Tesla T4", Peak(bf16=None, fp16=65.0, tf32=None, fp32=8.1)),
    *((pattern, Peak(*tflops)) for pattern, tflops in PEAK_TFLOPS.items()),
)


def peak_flops_per_second(device_name: str, dtype: torch.dtype, *, tf32: bool) -> float | None:
    """Dense peak of one device in FLOP/s, or None where it is not listed: MFU is then left out.

    ``device_name`` is what ``torch.cuda.get_device_name`` says; a name matches as a whole, so that a laptop's or a
    partition's never takes the full card's figure. ``dtype`` is that of the matrix products (bf16 also for float8, so
    that its MFU can be compared); ``tf32`` says whether fp32 products may use TF32.
    """
    for pattern, peak in PEAKS:
        if re.fullmatch(pattern, device_name.strip()):
            fp32 = peak.tf32 if tf32 and peak.tf32 is not None else peak.fp32
            tflops = {torch.bfloat16: peak.bf16, torch.float16: peak.fp16, torch.float32: fp32}.get(dtype)
            return None if tflops is None else tflops * TERA
    return None


def device_peak(device: torch.device, dtype: torch.dtype, *, tf32: bool) -> float | None:
    """``peak_flops_per_second`` of the device at hand; None on a CPU."""
    return peak_flops_per_second(torch.cuda.get_device_name(device), dtype, tf32=tf32) if device.type == "cuda" else None
