"""Who computes a recurrence: plain PyTorch, everywhere, or an installed package's kernels, on CUDA."""

import importlib
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

AUTO, REFERENCE = "auto", "reference"
"""``auto``: the first kernel that is installed and can run, else the reference. ``reference``: plain PyTorch."""

KERNELS = {
    "fla": ("fla.ops", "pip install flash-linear-attention"),
    "causal_conv1d": ("causal_conv1d", "pip install causal-conv1d"),
    "mamba_ssm": ("mamba_ssm.ops.triton.ssd_combined", "pip install mamba-ssm"),
}
"""What is imported of a package for its kernels, and how it is installed."""

CONVOLUTIONS = ("causal_conv1d",)
"""The kernels of short causal convolutions."""


def why_not(wanted: str, device_type: str, *, compiled: bool) -> str:
    """Why the backend that a table asks for cannot run; empty where it can. ``compiled``: whether torch.compile traces it."""
    if wanted in (AUTO, REFERENCE):
        return ""
    if device_type != "cuda":
        return f"backend '{wanted}' is for CUDA, and this is {device_type}; use 'auto' or 'reference'"
    if compiled:
        return f"backend '{wanted}' cannot be part of a compiled graph; set compile.enable to false, or use 'auto' or 'reference'"
    failure = import_failure(wanted)
    return f"backend '{wanted}' cannot be imported ({failure}); {KERNELS[wanted][1]}, or use 'auto' or 'reference'" if failure else ""


def note(wanted: str, device_type: str, *, compiled: bool, offered: Sequence[str]) -> str:
    """What ``auto`` is on devices of this type, and why it is no kernel; empty where the table asks for a backend by name."""
    if wanted != AUTO:
        return ""
    if device_type != "cuda":
        return f"{REFERENCE}, as kernels are for CUDA and this is {device_type}"
    missing = "; ".join(f"{name}: {failure}" for name in offered if (failure := import_failure(name)))
    found = _first_installed(offered) + (f" ({missing})" if missing else "")
    return f"{REFERENCE} in training, whose graphs hold no kernels; in evaluation {found}" if compiled else found


def chosen(wanted: str, x: Tensor, offered: Sequence[str]) -> str:
    """The backend for a recurrence over ``x``: ``wanted``, or what ``auto`` is here. ``offered``: the mixer's kernels, best first.

    Kernels serve CUDA tensors of 16 or 32 bits outside compiled graphs. A run tells what ``auto`` is at its start, by ``note``.
    """
    if wanted != AUTO:
        return wanted
    if x.device.type != "cuda" or torch.compiler.is_compiling() or x.dtype == torch.float64:
        return REFERENCE
    return _first_installed(offered)


def convolution(wanted: str, x_BTC: Tensor, taps: int) -> str:
    """The backend of a short causal convolution: causal-conv1d's kernel where it is installed and fits, unless ``wanted`` is the reference.

    It takes what ``chosen`` asks of kernels.
    """
    if (
        wanted == REFERENCE
        or not fits_convolution(taps, x_BTC.shape[-1])
        or x_BTC.device.type != "cuda"
        or torch.compiler.is_compiling()
        or x_BTC.dtype == torch.float64
    ):
        return REFERENCE
    return _first_installed(CONVOLUTIONS)


def fits_convolution(taps: int, n_channels: int) -> bool:
    """Whether causal-conv1d has a kernel for it: 2 to 4 taps, channels in eights."""
    return taps in (2, 3, 4) and n_channels % 8 == 0


def _first_installed(offered: Sequence[str]) -> str:
    return next((name for name in offered if not import_failure(name)), REFERENCE)


@cache
def import_failure(package: str) -> str:
    """Why the kernels of ``package`` cannot be imported; empty where they can."""
    try:
        importlib.import_module(KERNELS[package][0])
    except ImportError as error:
        return str(error)
    return ""
