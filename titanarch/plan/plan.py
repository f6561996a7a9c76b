"""A plan: what a configuration would need on so many processes of a device, and how long a step would take there."""

from dataclasses import dataclass

from titanarch.config.errors import ConfigError, Problem
from titanarch.contract.cost import Cost
from titanarch.contract.model import MODELS
from titanarch.parallel.mesh import Degrees, resolve_degrees
from titanarch.plan.devices import Device
from titanarch.plan.fit import largest_rows, vocab_size_of, with_rows
from titanarch.plan.predict import StepTime, step_time
from titanarch.plan.trace import StepTrace, trace_step
from titanarch.train.check import check_run
from titanarch.train.local_batch import available_bytes
from titanarch.train.resolve import param_dtype, resolve
from titanarch.train.run_config import RunConfig


@dataclass(frozen=True)
class Plan:
    """``config``: resolved. ``tokens``: of a step, over all processes."""

    config: RunConfig
    world_size: int
    device: Device
    degrees: Degrees
    cost: Cost
    trace: StepTrace
    time: StepTime

    @property
    def tokens(self) -> int:
        return self.config.training.global_batch_size * self.config.training.seq_len

    @property
    def fits(self) -> bool:
        return self.trace.peak.total <= capacity_bytes(self.device, self.world_size)


def capacity_bytes(device: Device, world_size: int) -> float:
    """What a process may fill: of the device's memory, or of this machine's among ``world_size`` processes."""
    whole = available_bytes(world_size) if device.memory_bytes is None else device.memory_bytes
    return whole * device.usable_memory


def resolved_for(config: RunConfig, device: Device) -> RunConfig:
    """``config`` with what it leaves open as it would be on ``device``."""
    if config.training.mixed_precision_param == "auto" and device.device_type == "cuda":
        training = config.training.model_copy(update={"mixed_precision_param": "bfloat16"})
        config = config.model_copy(update={"training": training})
    seed = config.debug.seed if config.debug.seed is not None else 0
    return resolve(config, seed=seed, device_type=device.device_type)


def make_plan(config: RunConfig, *, world_size: int, device: Device) -> Plan:
    """Check ``config`` as a run does before launch, then trace and predict. ConfigError with every conflict."""
    check_run(config, world_size=world_size, device_type=device.device_type)
    config = resolved_for(config, device)
    if config.training.local_batch_size == "auto":
        capacity = capacity_bytes(device, world_size)
        rows, peak = largest_rows(config, world_size=world_size, device_type=device.device_type, capacity_bytes=capacity)
        if rows == 0:
            text = f"not even one row fits into {capacity / 2**30:.2f} GiB: the predicted peak is {peak / 2**30:.2f} GiB; see --suggest"
            raise ConfigError(Problem(text, "training.local_batch_size"))
        config = with_rows(config, rows)
    vocab_size, degrees = vocab_size_of(config), resolve_degrees(config.parallelism, world_size)
    trace = trace_step(config, vocab_size, world_size=world_size, device_type=device.device_type)
    cost = MODELS.of(config.model).cost(config.model, vocab_size, config.training.seq_len)
    tokens = config.training.global_batch_size * config.training.seq_len
    time = step_time(
        training_flops=cost.training_flops_per_token * tokens / world_size,
        recomputed_share=recomputed_share(config),
        traffic=trace.traffic,
        state_bytes=sum(trace.state_bytes.values()),
        degrees=degrees,
        device=device,
        dtype=param_dtype(config),
    )
    return Plan(config, world_size, device, degrees, cost, trace, time)


def recomputed_share(config: RunConfig) -> float:
    """How much of a forward the backward makes again: all of it, or what is not a product in selective modes."""
    return {"none": 0.0, "full": 1.0}.get(config.activation_checkpoint.mode, 0.1)
