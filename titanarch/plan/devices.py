"""What a prediction knows of a device: one table, with its sources.

Peak FLOP/s are those of ``titanarch.train.metrics.devices``. Memory and bandwidths are the makers':

- H200 SXM, H100 SXM, A100 SXM 80 GB, B200 (HGX): NVIDIA's data sheets (memory, memory bandwidth, NVLink: total of both
  directions, of which a process sends half);
- MI300X: AMD's data sheet (192 GB, 5.3 TB/s, seven Infinity Fabric links of 64 GB/s each way);
- between nodes: one network card a GPU as in the makers' reference systems, 400 Gb/s (DGX H100 and H200, MI300X platforms),
  200 Gb/s (DGX A100), 400 Gb/s (DGX B200);
- cpu: one core of an Intel server with AMX, as measured for this project (181 GFLOP/s in float32, 1.2 TFLOP/s in bfloat16);
  bandwidths are round numbers for processes that share a machine.

``efficiency``: the share of the peak that a whole step reaches while it computes, 0.5, an estimate: TorchTitan's Llama 3 8B on 8
H100 with compile (6,667 tokens a second and GPU, its benchmarks of December 2024) comes to 0.35 of the peak in all, with its
communication, recomputation and updates, which are predicted apart here. ``link_efficiency``: the share of a link's speed that
collectives of many megabytes reach, 0.75.
"""

from dataclasses import dataclass

import torch

from titanarch.config.errors import ConfigError, did_you_mean
from titanarch.train.metrics.devices import TERA, peak_flops_per_second

GIGA = 1e9


@dataclass(frozen=True)
class Device:
    """``memory_bytes``: of one process; None: that of the machine. Bandwidths in bytes a second; of links, one way.

    ``full_name``: as torch gives it, which finds the peak. ``n_in_node``: processes of a node.
    """

    device_type: str
    full_name: str
    memory_bytes: float | None
    memory_bandwidth: float
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    n_in_node: int = 8
    efficiency: float = 0.5
    link_efficiency: float = 0.75
    usable_memory: float = 0.92
    """The share of the memory that a run may fill: the rest goes to the driver, the libraries and the allocator's gaps."""

    def peak_flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of one process, dense."""
        if self.device_type == "cpu":
            return 1.2 * TERA if dtype == torch.bfloat16 else 181 * GIGA
        found = peak_flops_per_second(self.full_name, dtype, tf32=False)
        assert found is not None, f"{self.full_name} has no peak for {dtype}"
        return found


DEVICES = {
    "h200": Device("cuda", "NVIDIA H200", 141e9, 4.8e12, 450e9, 50e9),
    "h100": Device("cuda", "NVIDIA H100 80GB HBM3", 80e9, 3.35e12, 450e9, 50e9),
    "a100": Device("cuda", "NVIDIA A100-SXM4-80GB", 80e9, 2.039e12, 300e9, 25e9),
    "b200": Device("cuda", "NVIDIA B200", 180e9, 8.0e12, 900e9, 50e9),
    "mi300x": Device("cuda", "AMD Instinct MI300X", 192e9, 5.3e12, 448e9, 50e9),
    "cpu": Device("cpu", "cpu", None, 10e9, 2e9, 1e9, n_in_node=1 << 20, efficiency=0.6),
}


def device_named(name: str) -> Device:
    """The device of the table; ConfigError for another name."""
    if name not in DEVICES:
        raise ConfigError(f"--device {name}: no such device{did_you_mean(name, DEVICES)}")
    return DEVICES[name]
