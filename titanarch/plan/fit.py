"""What fits: the largest micro-batch, and the smallest changes that would make a run fit. By traces, a process of their own.

A trace needs the default process group, and a training process has its own; so a run's questions are answered in a fresh one.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from titanarch.config.errors import ConfigError
from titanarch.data.tokenizers import build_tokenizer
from titanarch.parallel.mesh import resolve_degrees
from titanarch.plan.ledger import CATEGORIES, Peak
from titanarch.plan.trace import trace_step
from titanarch.train.check import check_run, vocabulary
from titanarch.train.local_batch import row_choices
from titanarch.train.resolve import local_batch_size
from titanarch.train.run_config import RunConfig

GIB = 2**30
ADVICE_SECONDS = 120.0
"""After so long no further change is tried."""
MOST_ADVICE = 3

T = TypeVar("T")


def vocab_size_of(config: RunConfig) -> int:
    """Rows of the embedding."""
    return vocabulary(config, build_tokenizer(config.data.tokenizer).vocab_size)


def with_rows(config: RunConfig, rows: int) -> RunConfig:
    """``config`` with micro-batches of ``rows``."""
    return config.model_copy(update={"training": config.training.model_copy(update={"local_batch_size": rows})})


def peak_of(config: RunConfig, *, world_size: int, device_type: str) -> Peak:
    """Predicted memory of a resolved ``config``."""
    return trace_step(config, vocab_size_of(config), world_size=world_size, device_type=device_type).peak


def largest_rows(config: RunConfig, *, world_size: int, device_type: str, capacity_bytes: float) -> tuple[int, float]:
    """Rows of the largest micro-batch whose predicted peak is within ``capacity_bytes``, and the peak.

    0 rows, and the peak of one, where one is too many. All rows at once need no sums of gradients and are tried first; for
    the others two traces give the bytes a row, and the choice is traced before it is returned.
    """

    def peak(rows: int) -> float:
        return float(peak_of(with_rows(config, rows), world_size=world_size, device_type=device_type).total)

    choices = row_choices(config.training.global_batch_size // resolve_degrees(config.parallelism, world_size).data_parallel)
    whole = peak(choices[0])
    if whole <= capacity_bytes or len(choices) == 1:
        return (choices[0] if whole <= capacity_bytes else 0), whole
    known = {1: peak(1)}
    if known[1] > capacity_bytes:
        return 0, known[1]
    if len(choices) > 2:
        known[choices[-2]] = peak(choices[-2])
        a_row = (known[choices[-2]] - known[1]) / (choices[-2] - 1)
        for rows in choices[1:-1]:
            if known[1] + (rows - 1) * a_row <= capacity_bytes:
                known.setdefault(rows, peak(rows))
                if known[rows] <= capacity_bytes:
                    return rows, known[rows]
    return 1, known[1]


def changes(config: RunConfig, world_size: int) -> Iterator[dict[str, Any]]:
    """Changes of keys that save memory, the smallest first; keys as in TOML."""
    degrees = resolve_degrees(config.parallelism, world_size)
    rows = local_batch_size(config, degrees.data_parallel)
    smaller = [{"training.local_batch_size": n} for n in row_choices(rows)[1:]]
    less: list[dict[str, Any]] = smaller[:2] + smaller[-1:] if len(smaller) > 2 else smaller
    full = [] if config.activation_checkpoint.mode == "full" else [{"activation_checkpoint.mode": "full"}]
    divided: list[dict[str, Any]] = []
    if degrees.dp_replicate > 1:
        divided.append({"parallelism.data_parallel_replicate_degree": 1, "parallelism.data_parallel_shard_degree": -1})
    for key, degree in (("context", degrees.cp), ("tensor", degrees.tp)):
        if degrees.dp_shard % 2 == 0:
            divided.append({f"parallelism.{key}_parallel_degree": 2 * degree, "parallelism.data_parallel_shard_degree": -1})
    yield from less
    yield from full
    yield from ({**a, **b} for a in full for b in less[-1:])
    yield from divided
    yield from ({**a, **b} for a in divided for b in full)


def changed(config: RunConfig, change: dict[str, Any]) -> RunConfig:
    """``config`` with other values of ``section.key``."""
    for key, value in change.items():
        section, _, name = key.partition(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    return config


def memory_lines(peak: Peak) -> list[str]:
    """A line a category, GiB."""
    lines = [f"  {category:<28} {peak.by_category[category] / GIB:>9.3f} GiB" for category in CATEGORIES]
    return [*lines, f"  {'peak':<28} {peak.total / GIB:>9.3f} GiB"]


def advice(config: RunConfig, *, world_size: int, device_type: str, capacity_bytes: float) -> str:
    """Predicted memory of ``config`` by category, and the smallest changes that are predicted to fit."""
    started = time.monotonic()
    lines = ["predicted memory of a process:", *memory_lines(peak_of(config, world_size=world_size, device_type=device_type))]
    found: list[str] = []
    for change in changes(config, world_size):
        if len(found) == MOST_ADVICE or time.monotonic() - started > ADVICE_SECONDS:
            break
        other = changed(config, change)
        try:
            check_run(other, world_size=world_size, device_type=device_type)
        except ConfigError:
            continue
        peak = peak_of(other, world_size=world_size, device_type=device_type).total
        if peak <= capacity_bytes:
            keys = ", ".join(f"{key} = {value!r}".replace("'", '"') for key, value in change.items())
            found.append(f"  {keys}   (predicted peak {peak / GIB:.3f} GiB)")
    if found:
        return "\n".join([*lines, f"changes that would fit into {capacity_bytes / GIB:.2f} GiB, the smallest first:", *found])
    return "\n".join([*lines, f"no single change would fit into {capacity_bytes / GIB:.2f} GiB; see titanarch plan --suggest"])


def in_fresh_process(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """``function(*args, **options)`` in a process without a process group."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **options).result()


class TracingPlanner:
    """A ``train.local_batch.MemoryPlanner``."""

    def largest_rows(self, config: RunConfig, *, world_size: int, device_type: str, capacity_bytes: float) -> tuple[int, float]:
        return in_fresh_process(largest_rows, config, world_size=world_size, device_type=device_type, capacity_bytes=capacity_bytes)

    def advice(self, config: RunConfig, *, world_size: int, device_type: str, capacity_bytes: float) -> str:
        try:
            return in_fresh_process(advice, config, world_size=world_size, device_type=device_type, capacity_bytes=capacity_bytes)
        except (BrokenProcessPool, OSError, MemoryError) as error:  # there may not be memory left to plan in
            return f"no plan could be made here ({type(error).__name__}); see titanarch plan --config FILE --world-size {world_size}"
