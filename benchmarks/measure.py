"""How speed is measured here: interleaved calls, paired ratios, intervals, a control, raw samples kept.

A machine that others use varies by a factor of two in wall time, so two programs are called in the order A B B A, each
round gives one ratio, and the figure is the median of the ratios with its bootstrap interval. Beside every ratio stands
that of A against itself, measured in the same rounds: where its interval misses 1, the run says nothing and is void.
"""

import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Sample:
    """One call: elapsed and processor time, seconds."""

    wall_seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Comparison:
    """Two programs, and the rounds of samples in the order called: ``rounds`` A B B A, ``control`` A A A A.

    ``speedup`` is time of B over time of A: above 1, A is faster. ``valid``: the control's interval holds 1.
    """

    first: str
    second: str
    rounds: list[list[Sample]]
    control: list[list[Sample]]
    wall_speedup: Ratio
    cpu_speedup: Ratio
    control_speedup: Ratio
    first_median_seconds: float
    second_median_seconds: float
    valid: bool

    def summary(self) -> str:
        """One line for people."""
        verdict = "" if self.valid else "  VOID: the control misses 1"
        return (
            f"{self.first} {self.first_median_seconds:.4g} s, {self.second} {self.second_median_seconds:.4g} s: "
            f"speedup {self.wall_speedup} wall, {self.cpu_speedup} CPU; A/A {self.control_speedup}{verdict}"
        )


def call(program: Callable[[], object], synchronize: Callable[[], object] | None = None) -> Sample:
    """Times one call. ``synchronize`` waits for a device, before and after."""
    if synchronize is not None:
        synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    program()
    if synchronize is not None:
        synchronize()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


def bootstrap_ratio(ratios: Sequence[float], *, n_resamples: int = 10_000, seed: int = 0) -> Ratio:
    """Median of ``ratios`` with the percentile interval of resampled medians."""
    values = np.asarray(ratios, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(values), (n_resamples, len(values)))
    low, high = np.percentile(np.median(values[draws], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(values)), float(low), float(high))


def _ratios(rounds: Sequence[Sequence[Sample]], clock: str) -> list[float]:
    """Of each round of four, time of the middle two over time of the outer two."""
    times = [[getattr(sample, clock) for sample in samples] for samples in rounds]
    return [(b + c) / (a + d) for a, b, c, d in times]


def compare(
    first: tuple[str, Callable[[], object]],
    second: tuple[str, Callable[[], object]],
    *,
    n_rounds: int,
    n_warmup: int = 1,
    synchronize: Callable[[], object] | None = None,
) -> Comparison:
    """``n_rounds`` rounds of A B B A, each followed by A A A A. The programs: (name, function without arguments)."""
    (first_name, a), (second_name, b) = first, second
    for _ in range(n_warmup):
        call(a, synchronize)
        call(b, synchronize)
    rounds, control = [], []
    for i in range(n_rounds):
        rounds.append([call(program, synchronize) for program in (a, b, b, a)])
        control.append([call(a, synchronize) for _ in range(4)])
        if sys.stderr.isatty():
            end = "\n" if i + 1 == n_rounds else ""
            print(f"\r{first_name} / {second_name}: round {i + 1} of {n_rounds}", end=end, file=sys.stderr, flush=True)
    return comparison_of(first_name, second_name, rounds=rounds, control=control)


def comparison_of(first: str, second: str, *, rounds: list[list[Sample]], control: list[list[Sample]]) -> Comparison:
    """What samples say; see Comparison. ``first`` and ``second``: names."""
    control_ratio = bootstrap_ratio(_ratios(control, "wall_seconds"))
    return Comparison(
        first=first,
        second=second,
        rounds=rounds,
        control=control,
        wall_speedup=bootstrap_ratio(_ratios(rounds, "wall_seconds")),
        cpu_speedup=bootstrap_ratio(_ratios(rounds, "cpu_seconds")),
        control_speedup=control_ratio,
        first_median_seconds=float(np.median([r[i].wall_seconds for r in rounds for i in (0, 3)])),
        second_median_seconds=float(np.median([r[i].wall_seconds for r in rounds for i in (1, 2)])),
        valid=control_ratio.low <= 1.0 <= control_ratio.high,
    )


def peak_memory_bytes() -> int:
    """The most memory this process has held so far: on a GPU torch's allocated peak, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: on Linux a new process inherits its parent's peak there
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _rise(make: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> int:
    program = make(*arguments)
    before = peak_memory_bytes()
    program()
    return peak_memory_bytes() - before


def memory_rise_bytes(make: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """How far one call of ``make(*arguments)`` lifts the peak memory of a fresh process. ``make``: at a module's top level."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_rise, make, arguments).result()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def surroundings() -> dict[str, Any]:
    """Device, versions, threads and commit: what a figure depends on."""
    commit = _git("rev-parse", "HEAD")
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "titanarch")) if commit else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def record(name: str, results: Sequence[Comparison | dict[str, Any]], *, settings: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes ``folder/name.json``: surroundings, settings, and every raw sample. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    items = [asdict(item) if isinstance(item, Comparison) else item for item in results]
    text = json.dumps({"benchmark": name, **surroundings(), "settings": settings, "results": items}, indent=1)
    path.write_text(text + "\n")
    return path
