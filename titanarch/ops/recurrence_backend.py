"""Who computes a recurrence: plain PyTorch, everywhere, or an installed package's kernels, on CUDA."""

import importlib
import logging
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

logger = logging.getLogger(__name__)


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


def chosen(wanted: str, x: Tensor, offered: Sequence[str]) -> str:
    """The backend for a recurrence over ``x``: ``wanted``, or what ``auto`` is here. ``offered``: the mixer's kernels, best first.

    Kernels serve CUDA tensors of 16 or 32 bits outside compiled graphs. What ``auto`` is on CUDA is logged once.
    """
    if wanted != AUTO:
        return wanted
    if x.device.type != "cuda" or torch.compiler.is_compiling() or x.dtype == torch.float64:
        return REFERENCE
    return _first_installed("recurrences", tuple(offered))


def convolution(wanted: str, x_BTC: Tensor, taps: int) -> str:
    """The backend of a short causal convolution: causal-conv1d's kernel where it is installed and fits, unless ``wanted`` is the reference.

    It takes 2 to 4 taps, channels in eights, and what ``chosen`` asks of kernels.
    """
    fits = taps in (2, 3, 4) and x_BTC.shape[-1] % 8 == 0
    if wanted == REFERENCE or not fits or x_BTC.device.type != "cuda" or torch.compiler.is_compiling() or x_BTC.dtype == torch.float64:
        return REFERENCE
    return _first_installed("short convolutions", ("causal_conv1d",))


@cache
def _first_installed(what: str, offered: tuple[str, ...]) -> str:
    failures = {name: import_failure(name) for name in offered}
    found = next((name for name, failure in failures.items() if not failure), REFERENCE)
    missing = "; ".join(f"{name}: {failure}" for name, failure in failures.items() if failure)
    logger.info("%s use the backend '%s'%s", what, found, f" ({missing})" if missing else "")
    return found


@cache
def import_failure(package: str) -> str:
    """Why the kernels of ``package`` cannot be imported; empty where they can."""
    try:
        importlib.import_module(KERNELS[package][0])
    except ImportError as error:
        return str(error)
    return ""
