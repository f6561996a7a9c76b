"""How much memory a process uses, in GiB: of its accelerator, or its own on the CPU."""

import os
import resource
import sys
from pathlib import Path

import torch

GIB = 2**30
STATM = Path("/proc/self/statm")


def process_gib() -> float:
    """Resident memory of this process now (its peak where the system has no /proc)."""
    try:
        pages = int(STATM.read_bytes().split()[1])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


class MemoryMeter:
    """On CUDA and ROCm the peak of allocated memory since the last reading; elsewhere the process's resident memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak_gib = 0.0
        """The largest reading so far."""

    def read_gib(self) -> float:
        """The reading now. On CUDA it starts a new peak, which other users of the allocator's peak would notice."""
        if self._device.type == "cuda":
            gib = torch.cuda.max_memory_allocated(self._device) / GIB
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            gib = process_gib()
        self.peak_gib = max(self.peak_gib, gib)
        return gib
