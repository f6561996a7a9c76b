"""A predicted step time: arithmetic, exposed communication and the update, from a device's table. All of it is an estimate.

compute  = FLOPs of a process / (peak x efficiency), with a fourth forward where everything is recomputed
exposed  = what tensor and context parallelism send, which the next product waits for, and what is left of FSDP's traffic
           after it has run beside the products of the same step
update   = bytes that the optimizer reads and writes / memory bandwidth
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from titanarch.parallel.mesh import Degrees
from titanarch.plan.devices import Device
from titanarch.plan.trace import Traffic

OVERLAPPED = ("dp_shard_cp", "dp_replicate")
"""Axes whose collectives FSDP2 runs beside the computation."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: ``compute``, ``exposed`` communication, ``update``; ``hidden``: communication beside the computation."""

    compute: float
    exposed: float
    hidden: float
    update: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.update


def link_bandwidth(axis: str, degrees: Degrees, device: Device) -> float:
    """Bytes a second that a process sends along ``axis``: within a node where the axis and those inside it fit into one."""
    inner = {"tp": 1, "cp": degrees.tp, "dp_shard_cp": degrees.tp, "dp": degrees.tp * degrees.cp}
    own = {"tp": degrees.tp, "cp": degrees.cp, "dp_shard_cp": degrees.dp_shard * degrees.cp, "dp": degrees.data_parallel}
    reach = inner[axis] * own[axis] if axis in own else degrees.world_size
    bandwidth = device.intra_node_bandwidth if reach <= device.n_in_node else device.inter_node_bandwidth
    return bandwidth * device.link_efficiency


def step_time(
    *,
    training_flops: float,
    recomputed_share: float,
    traffic: Iterable[Traffic],
    state_bytes: float,
    degrees: Degrees,
    device: Device,
    dtype: torch.dtype,
) -> StepTime:
    """Of one process. ``training_flops``: its three forwards' worth; ``recomputed_share``: of a forward, done once more.

    ``state_bytes``: parameters, gradients and optimizer states, each read and written once.
    """
    compute = training_flops * (1 + recomputed_share / 3) / (device.peak_flops(dtype) * device.efficiency)
    waited = beside = 0.0
    for item in traffic:
        seconds = item.sent_bytes / link_bandwidth(item.axis, degrees, device)
        if item.axis in OVERLAPPED:
            beside += seconds
        else:
            waited += seconds
    hidden = min(beside, compute)
    return StepTime(compute, waited + beside - hidden, hidden, 2 * state_bytes / device.memory_bandwidth)
