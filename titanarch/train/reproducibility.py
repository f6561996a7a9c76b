"""[debug]: the seed and the deterministic mode; and when Python collects garbage."""

import gc
import os
import random
from typing import Annotated

import numpy
import torch
import torch.distributed as dist
from pydantic import Field

from titanarch.config.errors import ConfigError, Problem
from titanarch.config.section import FREE, Section

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_DETERMINISTIC = (":4096:8", ":16:8")


class DebugConfig(Section):
    """[debug]: what makes runs repeatable."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        None, description="seed of weights, data order and random draws; an unset one is drawn and recorded"
    )
    deterministic: bool = Field(
        False, description="whether only operations that repeat bitwise may be used, slower on GPUs", json_schema_extra=FREE
    )


def resolve_seed(configured: int | None, device: torch.device) -> int:
    """The configured seed, or one that process 0 draws from the operating system, below 2**32; the same everywhere.

    ``device``: where the default process group can broadcast from.
    """
    if configured is not None:
        return configured
    drawn = int.from_bytes(os.urandom(4), "little")
    if not dist.is_initialized():
        return drawn
    seed = torch.tensor(drawn, dtype=torch.int64, device=device)
    dist.broadcast(seed, src=0)
    return int(seed)


def seed_global_generators(seed: int) -> None:
    """Seed Python's, NumPy's and torch's own generators, which user components and other packages may draw from.

    titanarch itself draws from generators keyed by name, row and position, which do not depend on these.
    """
    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # noqa: NPY002  the generator that other packages use
    torch.manual_seed(seed)


def set_deterministic(enabled: bool, device_type: str) -> None:
    """Switch the deterministic mode of this process; before the first matrix product on a GPU.

    An operation without a deterministic form then raises. Raises ConfigError where the environment gives cuBLAS a
    workspace that does not repeat.
    """
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.deterministic = enabled
    if not enabled:
        return
    torch.backends.cudnn.benchmark = False
    if device_type != "cuda":
        return
    workspace = os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_DETERMINISTIC[0])
    if workspace not in CUBLAS_DETERMINISTIC:
        allowed = " or ".join(CUBLAS_DETERMINISTIC)
        message = f"the environment sets {CUBLAS_VARIABLE} to {workspace!r}, which does not repeat: unset it, or set {allowed}"
        raise ConfigError(Problem(message, key="debug.deterministic"))


class GarbageCollection:
    """Collects garbage every so many steps, at the same step on all processes, in place of whenever Python likes.

    A process that collects makes all others wait at the next collective, so they had better do it together. What lives
    when training starts is frozen and never looked at again.
    """

    def __init__(self, every_n_steps: int) -> None:
        """``every_n_steps``: training.gc_freq, at least 1."""
        self.every_n_steps = every_n_steps

    def __enter__(self) -> "GarbageCollection":
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def __exit__(self, *exception: object) -> None:
        gc.unfreeze()
        gc.enable()

    def after_step(self, step: int) -> None:
        """Collect if it is time; ``step`` counts finished steps."""
        if step % self.every_n_steps == 0:
            gc.collect()
