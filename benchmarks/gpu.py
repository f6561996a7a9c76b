"""Everything that needs a GPU, by one command, in under nine minutes.

    PYTHONPATH=. python benchmarks/gpu.py                  # exit status 0 all ran, 1 something failed, 3 there is no GPU
    PYTHONPATH=. python benchmarks/gpu.py --dry-run        # tiny shapes on a CPU: every line but the kernels

The items: the tests marked gpu; tokens/s and MFU of four models with and without compile (random tokens, bf16, rows of
2,048); attention with ALiBi and with a learned linear bias against plain causal attention, forward and backward, at 2k to
32k. Each item is a process of its own with a time limit, and what it found is in ``benchmarks/results/gpu-<device>.json``
as soon as it ends, also when it fails or is cut off. MFU counts visible keys only, against the dense peak.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_items import LENGTHS, measure_attention, measure_model
from measure import record

ROOT = Path(__file__).parents[1]
NO_GPU = 3
LEAST_SECONDS = 10.0
Write = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Item:
    """``kind``: tests, model or attention. ``subject``: a file of train_configs, or a position scheme."""

    kind: str
    subject: str = ""
    compiled: bool = False
    limit_seconds: float = 60.0


ITEMS: dict[str, Item] = {
    "tests": Item("tests", limit_seconds=90),
    "gpt_125m": Item("model", "gpt_125m", limit_seconds=30),
    "gpt_125m-compiled": Item("model", "gpt_125m", compiled=True),
    "gpt_1_3b-compiled": Item("model", "gpt_1_3b", compiled=True),
    "llama3_1b-compiled": Item("model", "llama3_1b", compiled=True),
    "gpt_350m-compiled": Item("model", "gpt_350m", compiled=True),
    "alibi": Item("attention", "alibi"),
    "linear_cpb": Item("attention", "linear_cpb"),
    "gpt_350m": Item("model", "gpt_350m", limit_seconds=30),
    "gpt_1_3b": Item("model", "gpt_1_3b", limit_seconds=30),
    "llama3_1b": Item("model", "llama3_1b", limit_seconds=30),
}


def run_item(item: Item, write: Write, *, dry_run: bool) -> None:
    """Measure one item here; each finding goes to ``write`` at once."""
    if item.kind == "model":
        measure_model(item.subject, write, compiled=item.compiled, dry_run=dry_run)
    else:
        for length in LENGTHS:
            measure_attention(item.subject, length, write, dry_run=dry_run)


def command(name: str, findings: Path, *, dry_run: bool) -> list[str]:
    """What runs item ``name`` in a process of its own."""
    if ITEMS[name].kind == "tests":
        arguments = ["-m", "pytest", "-m", "gpu", "-q", "-rfE", "--continue-on-collection-errors", "-p", "no:cacheprovider", "tests"]
        return [sys.executable, *arguments, *(["--collect-only"] if dry_run else [])]
    return [sys.executable, str(Path(__file__)), "--item", name, "--findings", str(findings), *(["--dry-run"] if dry_run else [])]


def run_apart(name: str, seconds: float, *, dry_run: bool) -> dict[str, Any]:
    """Run item ``name`` in a process of its own for at most ``seconds``; what it found, and how it ended."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        findings = Path(folder) / "findings.jsonl"
        findings.touch()
        try:
            done = subprocess.run(
                command(name, findings, dry_run=dry_run), cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
            )
            output = done.stdout + done.stderr
            status = "ok" if done.returncode == 0 else f"failed with exit status {done.returncode}"
        except subprocess.TimeoutExpired as error:
            output = "".join(part.decode(errors="replace") for part in (error.stdout, error.stderr) if isinstance(part, bytes))
            status = f"cut off after {seconds:.0f} s"
        # A process that was cut off may leave half a line.
        lines = [line for line in findings.read_text().splitlines(keepends=True) if line.endswith("\n")]
    tail = output[-3000:] if status != "ok" or ITEMS[name].kind == "tests" else ""
    found = [json.loads(line) for line in lines]
    return {"item": name, "status": status, "seconds": time.monotonic() - started, "findings": found, "output": tail}


def shown(result: dict[str, Any]) -> str:
    """A line for each finding."""
    lines = [f"{result['item']}: {result['status']}, {result['seconds']:.0f} s"]
    lines += [f"  {finding['summary']}" for finding in result["findings"]]
    if result["status"] != "ok":
        lines += [f"  | {line}" for line in result["output"].splitlines()[-8:]]
    return "\n".join(lines)


def run_all(names: list[str], *, seconds: float, dry_run: bool, folder: Path) -> int:
    """All items in turn within ``seconds``, recorded in ``folder`` as they end; the exit status."""
    deadline = time.monotonic() + seconds
    device = "dry-run" if dry_run else torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    results: list[dict[str, Any]] = []
    for name in names:
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            results.append({"item": name, "status": "not run: no time was left", "seconds": 0.0, "findings": [], "output": ""})
        else:
            results.append(run_apart(name, min(ITEMS[name].limit_seconds, left), dry_run=dry_run))
        path = record(f"gpu-{slug}", results, settings={"items": names, "seconds": seconds, "dry_run": dry_run}, folder=folder)
        print(shown(results[-1]), flush=True)
    print(path)
    return 0 if all(result["status"] == "ok" for result in results) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", nargs="+", choices=list(ITEMS), default=list(ITEMS))
    parser.add_argument("--seconds", type=float, default=520.0, help="for all items together")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, no compilation")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "results", help="of the record")
    parser.add_argument("--item", choices=list(ITEMS), help=argparse.SUPPRESS)
    parser.add_argument("--findings", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks/gpu.py: torch sees no GPU here; --dry-run tries the code on a CPU", file=sys.stderr)
        return NO_GPU
    if options.item is None:
        return run_all(options.items, seconds=options.seconds, dry_run=options.dry_run, folder=options.folder)

    def write(finding: dict[str, Any]) -> None:
        with options.findings.open("a") as file:
            file.write(json.dumps(finding) + "\n")

    run_item(ITEMS[options.item], write, dry_run=options.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
