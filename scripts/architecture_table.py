"""Train every file of train_configs/architectures/ for the same tokens with the same seeds, and tabulate what came of it.

python scripts/architecture_table.py                                   all files, 3 seeds, 200 steps; hours on a CPU
python scripts/architecture_table.py --names attention mamba2 --seeds 42 --steps 20 --out ''
python scripts/architecture_table.py --table-only                      the table of the runs that are there

Each run is a folder in outputs/architecture_table; one that has ended is not run again, one that was cut off is resumed. Writes
docs/architectures.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "train_configs" / "architectures"
RUNS = ROOT / "outputs" / "architecture_table"
BASELINE = "attention"

PAGE = """# Architectures, side by side

`python scripts/architecture_table.py` trained the files of `train_configs/architectures/` for {steps} steps of {tokens_a_step:,} tokens
of the package's corpus, each with the seeds {seeds}: the same rows in the same order, the same initial weights where parts have the
same name, the same learning rate and schedule. All have the non-embedding parameters of `small` within 1 %; where a token goes through
a part of them, as many active ones, as each file says.

Read it with care. {total_tokens:,} tokens are {share:.0%} of an epoch and far from convergence; one learning rate serves all, tuned for
none; tokens/s and memory are those of plain PyTorch on a CPU ({machine}; {jobs} at a time, threads of each: {threads}), where no
kernel of a GPU runs; other work on the machine slows runs, so compare tokens/s only where there was none. Differences below the
spread of seeds say nothing, and ranks at so few tokens do not predict later ones.

First loss: of the first step, before any update, mean over seeds; a model that knows nothing has ln 8,192 = 9.011, and the spread
of its first logits adds half their variance. Loss: on the validation rows in nats a token, mean and sample standard deviation over
seeds. Difference: from `{baseline}` on the same seed, mean and sample standard deviation of the pairs. Parameters are without embedding
and head; active are those that a token meets. FLOPs: forward, a token, in millions. Memory: largest of the process, the interpreter
included.

{table}
{missing}
"""


@dataclass(frozen=True)
class Run:
    """One configuration with one seed. ``result``: its result.json. ``first``: the loss of its first step."""

    name: str
    seed: int
    result: dict[str, Any]
    first: float

    @property
    def loss(self) -> float:
        return float(self.result["losses"]["validation"])


def folder(name: str, seed: int, steps: int) -> Path:
    return RUNS / f"{name}-{seed}-{steps}"


def threads_of(jobs: int) -> int:
    """The threads of each of ``jobs`` runs on this machine."""
    return max(1, (os.cpu_count() or 1) // jobs)


def run(name: str, seed: int, steps: int, extra: Sequence[str], jobs: int) -> int:
    """Train one of ``jobs`` at a time; its exit status."""
    command = [
        *(sys.executable, "-m", "titanarch", "train", "--config", str(CONFIGS / f"{name}.toml")),
        *("--job.dump_folder", str(folder(name, seed, steps)), "--debug.seed", str(seed), "--training.steps", str(steps)),
        *("--validation.interval", str(steps), "--evaluation.enable", "false", "--checkpoint.keep_latest_k", "1", *extra),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads_of(jobs))}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def read(names: Sequence[str], seeds: Sequence[int], steps: int) -> list[Run]:
    """The runs that have ended."""
    ended = [(name, seed, path) for name in names for seed in seeds if ((path := folder(name, seed, steps)) / "result.json").is_file()]
    return [Run(name, seed, json.loads((path / "result.json").read_text("utf-8")), first_loss(path)) for name, seed, path in ended]


def first_loss(path: Path) -> float:
    """Of the first step in a run's folder."""
    with (path / "metrics.jsonl").open(encoding="utf-8") as file:
        row = json.loads(file.readline())
    assert row["step"] == 1, f"{path} does not begin with step 1"
    return float(row["loss"])


def spread(values: Sequence[float], form: str) -> str:
    """Mean and sample standard deviation; one value has none."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def table(runs: Sequence[Run]) -> str:
    """A line an architecture, the lowest loss first."""
    base = {run.seed: run.loss for run in runs if run.name == BASELINE}
    by_name: dict[str, list[Run]] = {}
    for each in runs:
        by_name.setdefault(each.name, []).append(each)
    lines = [
        "| file | seeds | first loss | loss | difference | tokens/s | memory, GiB | parameters, M | active, M | FLOPs, M |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, its in sorted(by_name.items(), key=lambda item: statistics.mean(run.loss for run in item[1])):
        pairs = [run.loss - base[run.seed] for run in its if run.seed in base]
        result = its[0].result
        cells = [
            name,
            str(len(its)),
            f"{statistics.mean(run.first for run in its):.3f}",
            spread([run.loss for run in its], ".3f"),
            spread(pairs, "+.3f") if pairs and name != BASELINE else "",
            f"{statistics.median(run.result['tokens_per_second'] for run in its):,.0f}",
            f"{max(run.result['peak_memory_gib'] for run in its):.1f}",
            f"{result['non_embedding_parameters'] / 1e6:.2f}",
            f"{(result['non_embedding_parameters'] + result['active_parameters'] - result['parameters']) / 1e6:.2f}",
            f"{result['forward_flops_per_token'] / 1e6:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(runs: Sequence[Run], wanted: Sequence[tuple[str, int]], steps: int, jobs: int) -> str:
    """docs/architectures.md."""
    seen = {(run.name, run.seed) for run in runs}
    absent = sorted({name for name, seed in wanted if (name, seed) not in seen})
    result = runs[0].result
    return PAGE.format(
        steps=steps,
        tokens_a_step=result["tokens"] // result["step"],
        total_tokens=result["tokens"],
        share=result["epochs"],
        seeds=", ".join(str(seed) for seed in sorted({run.seed for run in runs})),
        jobs=jobs,
        threads=threads_of(jobs),
        machine=platform.machine(),
        baseline=BASELINE,
        table=table(runs),
        missing=f"\nNot seen with every seed: {', '.join(absent)}." if absent else "",
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in CONFIGS.glob("*.toml"))
    parser.add_argument("--names", nargs="+", default=known, choices=known, metavar="NAME", help="files to run; all unless given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1337, 3407], metavar="N")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="optimizer steps of each run")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    parser.add_argument("--out", default="docs/architectures.md", help="the page to write; empty: print the table alone")
    parser.add_argument("overrides", nargs="*", help="--section.key=VALUE after --, for all runs")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0 where every run ended, 1 where one did not."""
    args = parse(argv)
    wanted = [(name, seed) for seed in args.seeds for name in args.names]
    missing = [(name, seed) for name, seed in wanted if not (folder(name, seed, args.steps) / "result.json").is_file()]
    with ThreadPoolExecutor(args.jobs) as pool:
        statuses = {each: pool.submit(run, *each, args.steps, args.overrides, args.jobs) for each in ([] if args.table_only else missing)}
        failed = [f"{name}, seed {seed}" for (name, seed), status in statuses.items() if status.result()]
    runs = read(args.names, args.seeds, args.steps)
    if not runs:
        print("no run has ended", file=sys.stderr)
        return 1
    print(table(runs))
    if args.out:
        (ROOT / args.out).write_text(page(runs, wanted, args.steps, args.jobs), "utf-8")
    for each in failed:
        print(f"did not end: {each}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
