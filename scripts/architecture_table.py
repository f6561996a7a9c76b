"""Train every file of train_configs/architectures/ for the same tokens with the same seeds, and tabulate what came of it.

python scripts/architecture_table.py                                   all files, 3 seeds, 200 steps; hours on a CPU
python scripts/architecture_table.py --names attention mamba2 --seeds 42 --steps 20 --out '' --store /tmp/runs.jsonl
python scripts/architecture_table.py --table-only                      the table of the runs that are there

Each run is a folder in outputs/architecture_table; one that was cut off is resumed. One that has ended is a line of the store, and is
not run again with the same steps and keys. Writes docs/architectures.md.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "train_configs" / "architectures"
RUNS = ROOT / "outputs" / "architecture_table"
STORE = ROOT / "benchmarks" / "results" / "architecture_table.jsonl"
BASELINE = "attention"
FORMS = (
    ("monarch_as_in_the_notes", "monarch", "diverges almost at once"),
    ("isotropic_as_in_the_notes", "isotropic", "does not converge"),
)
"""What the research notes saw fail and how, and the form that is to mend it."""
VOCABULARY, WARMUP_STEPS = 8192, 20
"""Of all the files."""

PAGE = """# Architectures, side by side

`python scripts/architecture_table.py` trained the files of `train_configs/architectures/` for {steps} steps of {tokens_a_step:,} tokens
of the package's corpus, each with the seeds {seeds}{keys}: the same rows in the same order, the same initial weights where parts
have the same name, the same learning rate and schedule. All have the non-embedding parameters of `small` within 1 %; where a token
goes through a part of them, as many active ones, as each file says. `benchmarks/results/architecture_table.jsonl` has every run.

Read it with care. {total_tokens:,} tokens are {share:.0%} of an epoch and far from convergence; one learning rate serves all, tuned for
none; tokens/s and memory are those of plain PyTorch on a CPU ({device}; {jobs} at a time, threads of each: {threads}), where no
kernel of a GPU runs; other work on the machine slows runs, so compare tokens/s only where there was none. Differences below the
spread of seeds say nothing, and ranks at so few tokens do not predict later ones. `encoder_decoder` fills in spans that were cut out,
given what is on both sides of them: another task, whose loss is not to be compared with the others'.

First loss: of the first step, before any update, mean over seeds; a model that knows nothing has ln {vocabulary:,} = {uniform:.3f}, and
the spread of its first logits adds half their variance. Worst: the highest loss logged after the {warmup} steps of the warm-up, of all
seeds. Loss: on the validation rows in nats a token, mean and sample standard deviation over seeds. Difference: from `{baseline}` on
the same seed, mean and sample standard deviation of the pairs. Tokens/s: of the fastest seed. Parameters are without embedding and head;
active are those that a token meets. FLOPs: forward, a token, in millions. Memory: largest of the process, the interpreter included.

{table}

Diverged, which is a loss after the warm-up that is not finite or above ln {vocabulary:,}: {diverged}.
{forms}{missing}"""


@dataclass(frozen=True)
class Run:
    """One configuration with one seed that has ended: a line of the store.

    ``keys``: --section.key=VALUE that it was given. ``losses``: (step, loss) of each logged step. ``result``: its result.json.
    """

    name: str
    seed: int
    steps: int
    keys: list[str]
    losses: list[tuple[int, float]]
    result: dict[str, Any]

    @property
    def loss(self) -> float:
        return float(self.result["losses"]["validation"])

    @property
    def first(self) -> float:
        """The loss before any update."""
        assert self.losses[0][0] == 1, f"{self.name}, seed {self.seed}, does not begin with step 1"
        return self.losses[0][1]

    @property
    def worst(self) -> float:
        """The highest loss after the warm-up; infinite where one is not finite."""
        return max(loss if math.isfinite(loss) else math.inf for step, loss in self.losses if step > WARMUP_STEPS)


def folder(name: str, seed: int, steps: int) -> Path:
    return RUNS / f"{name}-{seed}-{steps}"


def threads_of(jobs: int) -> int:
    """The threads of each of ``jobs`` runs on this machine."""
    return max(1, (os.cpu_count() or 1) // jobs)


def run(name: str, seed: int, steps: int, keys: Sequence[str], jobs: int) -> None:
    """Train one of ``jobs`` at a time; what went wrong stands on the terminal."""
    command = [
        *(sys.executable, "-m", "titanarch", "train", "--config", str(CONFIGS / f"{name}.toml")),
        *("--job.dump_folder", str(folder(name, seed, steps)), "--debug.seed", str(seed), "--training.steps", str(steps)),
        *("--validation.interval", str(steps), "--evaluation.enable", "false", "--checkpoint.keep_latest_k", "1", *keys),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads_of(jobs))}
    subprocess.run(command, cwd=ROOT, env=environment, check=False)


def ended(name: str, seed: int, steps: int, keys: Sequence[str]) -> Run | None:
    """The run in its folder, if it has ended."""
    path = folder(name, seed, steps)
    if not (path / "result.json").is_file():
        return None
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    result = json.loads((path / "result.json").read_text("utf-8"))
    del result["run"]  # a folder of this machine
    return Run(name, seed, steps, list(keys), losses, result)


def read(store: Path, steps: int, keys: Sequence[str]) -> dict[tuple[str, int], Run]:
    """The runs of so many steps with these keys, by name and seed; of several the latest."""
    lines = store.read_text("utf-8").splitlines() if store.is_file() else []
    runs = [Run(**json.loads(line)) for line in lines]
    return {(run.name, run.seed): run for run in runs if (run.steps, run.keys) == (steps, list(keys))}


def append(store: Path, run: Run) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    with store.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(run)) + "\n")


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
        "| file | seeds | first loss | worst | loss | difference | tokens/s | memory, GiB | parameters, M | active, M | FLOPs, M |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, its in sorted(by_name.items(), key=lambda item: statistics.mean(run.loss for run in item[1])):
        pairs = [run.loss - base[run.seed] for run in its if run.seed in base]
        result = its[0].result
        cells = [
            name,
            str(len(its)),
            f"{statistics.mean(run.first for run in its):.3f}",
            f"{max(run.worst for run in its):.3f}",
            spread([run.loss for run in its], ".3f"),
            spread(pairs, "+.3f") if pairs and name != BASELINE else "",
            f"{max(run.result['tokens_per_second'] for run in its):,.0f}",
            f"{max(run.result['peak_memory_gib'] for run in its):.1f}",
            f"{result['non_embedding_parameters'] / 1e6:.2f}",
            f"{(result['non_embedding_parameters'] + result['active_parameters'] - result['parameters']) / 1e6:.2f}",
            f"{result['forward_flops_per_token'] / 1e6:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def forms(runs: Sequence[Run], diverged: Sequence[str]) -> str:
    """Of each of FORMS whether it failed here, and how much less the mended one loses on the same seeds."""
    losses = {(run.name, run.seed): run.loss for run in runs}
    lines = []
    for failing, mended, how in FORMS:
        seeds = [seed for name, seed in losses if name == failing and (mended, seed) in losses]
        if seeds:
            found = "diverged" if failing in diverged else "did not diverge"
            by = spread([losses[mended, seed] - losses[failing, seed] for seed in seeds], "+.3f")
            lines.append(f"- `{failing}`, which {how} in the research notes, {found} here. The loss of `{mended}` from it: {by}.")
    return "\n".join(["", *lines, ""]) if lines else ""


def page(runs: Sequence[Run], wanted: Sequence[tuple[str, int]], jobs: int) -> str:
    """docs/architectures.md."""
    seen = {(run.name, run.seed) for run in runs}
    absent = sorted({name for name, seed in wanted if (name, seed) not in seen})
    diverged = sorted({run.name for run in runs if run.worst > math.log(VOCABULARY)})
    result = runs[0].result
    return PAGE.format(
        steps=runs[0].steps,
        tokens_a_step=result["tokens"] // result["step"],
        total_tokens=result["tokens"],
        share=result["epochs"],
        seeds=", ".join(str(seed) for seed in sorted({run.seed for run in runs})),
        keys=f" (`{' '.join(runs[0].keys)}`)" if runs[0].keys else "",
        jobs=jobs,
        threads=threads_of(jobs),
        device=" and ".join(sorted({run.result["environment"]["device"] for run in runs})),
        baseline=BASELINE,
        vocabulary=VOCABULARY,
        uniform=math.log(VOCABULARY),
        warmup=WARMUP_STEPS,
        table=table(runs),
        diverged=", ".join(diverged) or "none",
        forms=forms(runs, diverged),
        missing=f"\nNot seen with every seed: {', '.join(absent)}.\n" if absent else "",
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in CONFIGS.glob("*.toml"))
    parser.add_argument("--names", nargs="+", default=known, choices=known, metavar="NAME", help="files to run; all unless given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1337, 3407], metavar="N")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="optimizer steps of each run")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores")
    parser.add_argument("--store", type=Path, default=STORE, help="the file of runs that have ended")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    parser.add_argument("--out", default="docs/architectures.md", help="the page to write; empty: print the table alone")
    parser.add_argument("keys", nargs="*", help="--section.key=VALUE after --, for all runs")
    args = parser.parse_args(argv)
    if args.steps <= WARMUP_STEPS:
        parser.error(f"--steps {args.steps}: give more than the {WARMUP_STEPS} of the warm-up")
    return args


def main(argv: list[str] | None = None) -> int:
    """0 where every run ended, 1 where one did not."""
    args = parse(argv)
    wanted = [(name, seed) for seed in args.seeds for name in args.names]
    stored = read(args.store, args.steps, args.keys)
    failed = []

    def train(name: str, seed: int) -> Run | None:
        found = ended(name, seed, args.steps, args.keys)
        if found is None and not args.table_only:
            run(name, seed, args.steps, args.keys, args.jobs)
            found = ended(name, seed, args.steps, args.keys)
        return found

    with ThreadPoolExecutor(args.jobs) as pool:
        trained = {each: pool.submit(train, *each) for each in wanted if each not in stored}
        for each, future in trained.items():
            if (found := future.result()) is not None:
                append(args.store, found)
                stored[each] = found
            elif not args.table_only:
                failed.append(each)
    runs = [stored[each] for each in wanted if each in stored]
    if not runs:
        print("no run has ended", file=sys.stderr)
        return 1
    print(table(runs))
    if args.out:
        (ROOT / args.out).write_text(page(runs, wanted, args.jobs), "utf-8")
    for name, seed in failed:
        print(f"did not end: {name}, seed {seed}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
