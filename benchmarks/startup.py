"""From the command to the first finished step, against the time that importing takes.

    python benchmarks/startup.py [--runs 5]

Each run is a process of its own: ``titanarch train`` on the debug configuration, in a fresh folder, until the first row of
metrics.jsonl is there; and an interpreter that imports the same modules and ends. The two alternate.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import record

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "train_configs" / "debug.toml"
POLL_SECONDS = 0.005
TIMEOUT_SECONDS = 120.0


def import_seconds() -> float:
    """An interpreter that imports what training imports, and ends."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import titanarch.cli.main, titanarch.cli.train"], cwd=ROOT, check=True)
    return time.perf_counter() - started


def first_step_seconds(folder: Path) -> float:
    """Training, until the row of step 1 is written."""
    command = [sys.executable, "-m", "titanarch", "train", "--config", str(CONFIG), "--job.dump_folder", str(folder)]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None or time.perf_counter() - started > TIMEOUT_SECONDS:
                raise RuntimeError(f"no first step: exit status {process.poll()}")
            time.sleep(POLL_SECONDS)
        return time.perf_counter() - started
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="counted runs, after one that is not")
    args = parser.parse_args()
    imports, steps = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for run in range(args.runs + 1):
            imported, stepped = import_seconds(), first_step_seconds(Path(scratch, str(run)))
            if run:
                imports.append(imported)
                steps.append(stepped)
    differences = [step - imported for step, imported in zip(steps, imports, strict=True)]
    results = [{"import_seconds": imports, "first_step_seconds": steps, "difference_seconds": differences}]
    path = record("startup", results, settings={"config": CONFIG.name, "runs": args.runs})
    median = statistics.median
    print(f"import {median(imports):.2f} s, first step after {median(steps):.2f} s, difference {median(differences):.2f} s; {path}")


if __name__ == "__main__":
    main()
