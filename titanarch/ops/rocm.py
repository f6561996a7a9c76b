"""Where AMD's ROCm differs from CUDA; torch calls the devices of both ``cuda``.

- Attention: there is no cuDNN. Flash and memory-efficient attention come from AOTriton, which serves MI200 and MI300 at
  once and other architectures only where TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1 stands in the environment.
- float8: MI300 and MI325 (gfx940 to gfx942) multiply the *fnuz* formats, with one more exponent step and no negative
  zero; MI350 (gfx950) and later the formats of the Open Compute Project, as NVIDIA does.
- Visible devices: HIP_VISIBLE_DEVICES; the driver's ROCR_VISIBLE_DEVICES, which Slurm sets, hides devices before it.
- Peak FLOP/s: ``PEAK_TFLOPS``, from AMD's data sheets, dense, with fp32 accumulation on matrix cores. A torch device of
  an MI250(X) is one of its two dies, so half of the card's figure is listed.
"""

import warnings
from collections.abc import MutableMapping

import torch
from torch.nn.attention import SDPBackend

AOTRITON_FLAG = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"
SERVED_BY_AOTRITON = ("gfx90a", "gfx942")
FNUZ = ("gfx940", "gfx941", "gfx942")

PEAK_TFLOPS: dict[str, tuple[float, float, float | None, float]] = {
    r"AMD Instinct MI210": (181.0, 181.0, None, 45.3),
    r"AMD Instinct MI250": (181.05, 181.05, None, 45.25),
    r"AMD Instinct MI250X": (191.5, 191.5, None, 47.85),
    r"AMD Instinct MI3(00|25)X( (OAM|HF|VF))?": (1307.4, 1307.4, 653.7, 163.4),
    r"AMD Instinct MI350X": (2306.9, 2306.9, None, 144.2),
    r"AMD Instinct MI355X": (2516.6, 2516.6, None, 157.3),
}
"""By a pattern for the device's name: bf16, fp16, tf32 (None: no such units), fp32."""


def is_rocm() -> bool:
    """Whether this torch is built for ROCm."""
    return torch.version.hip is not None


def attention_backends() -> list[SDPBackend]:
    """What ``scaled_dot_product_attention`` may use on a GPU, in order of preference."""
    plain = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return plain if is_rocm() else [SDPBackend.CUDNN_ATTENTION, *plain]


def float8_formats(architecture: str | None) -> tuple[torch.dtype, torch.dtype]:
    """The types of weights and activations, and of gradients, that the hardware multiplies.

    ``architecture``: as in ``gcnArchName`` of the device, such as ``gfx942:sramecc+:xnack-``; None where it is not AMD's.
    """
    if architecture is not None and architecture.split(":")[0] in FNUZ:
        return torch.float8_e4m3fnuz, torch.float8_e5m2fnuz
    return torch.float8_e4m3fn, torch.float8_e5m2


def prepare(architecture: str, environment: MutableMapping[str, str]) -> None:
    """Call before the first attention on ROCm: switch AOTriton on where it is experimental, unless the user has chosen.

    Without it such devices compute attention by materialising all logits. Warns once, naming both.
    """
    if architecture.split(":")[0] not in SERVED_BY_AOTRITON and AOTRITON_FLAG not in environment:
        environment[AOTRITON_FLAG] = "1"
        warnings.warn(
            f"attention on {architecture} uses AOTriton's kernels, which are experimental there; "
            f"{AOTRITON_FLAG}=0 chooses plain attention, with memory quadratic in the length",
            stacklevel=2,
        )
