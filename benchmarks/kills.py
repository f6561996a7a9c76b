"""Runs killed by SIGKILL at random instants, and resized, to their end: what was lost.

    python benchmarks/kills.py [--kills 100] [--seed 1]

A tiny run that passes its data more than once and saves every second step is started, killed, and started again until it ends; then
the next run begins, until there were ``--kills`` kills. Instants are drawn in four ways: uniform over the time of a whole run from
its start on; after a random step; within 10 ms of the beginning of a save; and within 2 ms of the beginning of a commit, these two found by
watching the folder. All processes of the run are killed at once. Every start is a fork of a server that has imported the package.

Runs are of five families in turn. "fixed": one process, always alike, so that losses must be bitwise those of the undisturbed run.
In the others every start draws another number of processes, of workers and of rows at once, so the rows of every step must be those of
the undisturbed run, and losses agree up to the order of sums: "indexed" and "streamed" documents end to end, "groups" of a stream's
documents packed by best fit, and "phases" of shorter rows first, of a mixture of two sources, packed by best fit.

Of each kill are kept: the newest logged step, what was going on as the folder tells afterwards, and whether every committed checkpoint
verifies. Of each run: what `titanarch data ledger` says, whether every step had the undisturbed run's rows, and the losses.
"""

import argparse
import json
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from measure import record

from titanarch.checkpoint.listing import look_at
from titanarch.checkpoint.marker import MARKER
from titanarch.checkpoint.processes import Processes
from titanarch.checkpoint.storage import Storage
from titanarch.cli.main import main as titanarch_main
from titanarch.data.ledger_check import check_ledger
from titanarch.data.ledger_files import read_ledger
from titanarch.testing.processes import context

STEPS = 40
LONGEST_SECONDS = 120
FAMILIES = ("fixed", "indexed", "streamed", "groups", "phases")
INSTANTS = ("any", "step", "save", "commit")

CONFIG = """
[job]
dump_folder = "{folder}"
[model]
name = "decoder"
n_layers = 2
d_model = 32
n_heads = 2
dropout = 0.1
channel = {{ kind = "mlp", activation = "gelu" }}
position = {{ relative = "alibi" }}
[data]
validation = {{ kind = "jsonl", paths = ["{texts}"] }}
tokenizer = "bytes"
cache_dir = "{cache}"
ledger = true
[training]
seq_len = 32
global_batch_size = 8
steps = {steps}
mixed_precision_param = "float32"
[optimizer]
name = "AdamW"
lr = 1e-3
[checkpoint]
interval = 2
keep_latest_k = 3
[metrics]
log_freq = 1
sinks = ["jsonl"]
[validation]
interval = 1000
rows = 8
[evaluation]
enable = false
[debug]
seed = 7
"""

ONE = """
[data.source]
kind = "jsonl"
paths = ["{texts}"]
"""

TWO = """
[[data.source.sources]]
name = "one"
weight = 2.0
source = {{ kind = "jsonl", paths = ["{texts}"] }}
[[data.source.sources]]
name = "two"
weight = 1.0
source = {{ kind = "jsonl", paths = ["{others}"] }}
[data.source]
kind = "mixture"
"""

SHORTER = "[{steps = 14, seq_len = 16, global_batch_size = 16}]"

TABLES: dict[str, tuple[str, list[str]]] = {
    "indexed": (ONE, ["--data.mode=indexed"]),
    "streamed": (ONE, ["--data.mode=streamed"]),
    "groups": (ONE, ["--data.mode=streamed", "--data.packing=best_fit"]),
    "phases": (TWO, ["--data.mode=indexed", "--data.packing=best_fit", f"--training.phases={SHORTER}"]),
}
"""What the runs of a family have in their configuration and on their command line; "fixed" ones are "indexed"."""


@dataclass(frozen=True)
class Layout:
    """What a start may change. ``micro_batch``: rows at once; 0: all of a process."""

    n_processes: int = 1
    workers: int = 0
    micro_batch: int = 0

    def overrides(self) -> list[str]:
        micro = ["--training.local_batch_size", str(self.micro_batch)] if self.micro_batch else []
        return ["--data.workers", str(self.workers), *micro]


@dataclass(frozen=True)
class Kill:
    """``step``: of the newest row then. ``doing``: as the folder tells. ``committed``, ``unusable``: checkpoints, by name."""

    run: int
    family: str
    layout: Layout
    instant: str
    seconds_after_start: float
    step: int
    doing: str
    committed: list[str]
    unusable: list[str]


@dataclass
class Run:
    """A run to its end. ``other_rows``: steps whose rows were not those of the undisturbed run. ``bitwise``: all losses are."""

    family: str
    n_starts: int = 0
    n_steps_again: int = 0
    n_lost: int = 0
    n_doubled: int = 0
    problems: list[str] = field(default_factory=list)
    other_rows: list[int] = field(default_factory=list)
    bitwise: bool = False
    largest_relative_difference: float = 0.0


def write_texts(path: Path, *, seed: int = 0) -> None:
    """Documents of about 8,000 bytes together."""
    draw = random.Random(seed)
    words = ["the", "of", "and", "naïve", "that", "it", "was", "his", "with", "as", "for", "had", "you", "not", "which"]
    texts = (" ".join(draw.choices(words, k=draw.randint(5, 80))) for _ in range(60))
    path.write_text("".join(json.dumps({"text": text, "id": f"d{i}"}) + "\n" for i, text in enumerate(texts)))


def life(arguments: list[str], variables: dict[str, str], output: Path) -> None:
    """Of a fork: what ``python -m titanarch`` does."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    sys.exit(titanarch_main(arguments))


def start(config: Path, layout: Layout, output: Path, overrides: Sequence[str] = ()) -> list[ForkServerProcess]:
    """The processes of one start of a run."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    arguments = ["train", "--config", str(config), *layout.overrides(), *overrides]
    if layout.n_processes > 1:
        with socket.socket() as server:
            server.bind(("localhost", 0))
            port = server.getsockname()[1]
        variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(layout.n_processes)}
    forks = []
    for rank in range(layout.n_processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(layout.n_processes)} if layout.n_processes > 1 else {}
        forks.append(context().Process(target=life, args=(arguments, variables | place, output), daemon=False))
    for fork in forks:
        fork.start()
    return forks


def logged_step(folder: Path) -> int:
    """Of the newest whole row; 0 where there is none."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines[-3:]), default=0)


def unfinished(folder: Path) -> dict[str, set[str]]:
    """Files of each folder of a checkpoint that is not committed, by its name."""
    found = {}
    for path in folder.glob("checkpoints/step-*"):
        try:
            names = set(os.listdir(path))
        except FileNotFoundError:  # removed meanwhile
            continue
        if MARKER not in names:
            found[path.name] = names
    return found


def doing(folder: Path, step_before: int, before: dict[str, set[str]]) -> str:
    """What a run did when it was killed, which had been at ``step_before`` with ``before`` unfinished when it started."""
    fresh = [names for name, names in unfinished(folder).items() if name not in before]
    if any(f"{MARKER}.tmp" in names for names in fresh):
        return "commit: the marker was being written"
    if any(".metadata" in names and any(name.endswith(".distcp") for name in names) for names in fresh):
        return "commit: all files were there, but no marker"
    if fresh:
        return "save: files were being written, or an old checkpoint removed"
    return "steps" if logged_step(folder) != step_before else "start: before the first new step"


def waiter(instant: str, folder: Path, draw: random.Random, whole_seconds: float) -> tuple[Callable[[], bool], float]:
    """What has to be true, and the seconds to wait then, until a kill."""
    if instant == "any":
        return (lambda: True), draw.uniform(0, whole_seconds)
    if instant == "step":
        since, more = logged_step(folder), draw.randint(1, 8)
        return (lambda: logged_step(folder) != since and logged_step(folder) % 8 == more % 8), draw.uniform(0, 0.05)
    known, skip = set(unfinished(folder)), draw.randint(0, 4)
    seen: set[str] = set()

    def begun() -> bool:
        now = unfinished(folder)
        seen.update(name for name in now if name not in known)
        newest = [names for name, names in now.items() if name not in known]
        ready = bool(newest) if instant == "save" else any(".metadata" in names for names in newest)
        return ready and len(seen) > skip

    return begun, draw.uniform(0, 0.01 if instant == "save" else 0.002)


def wait_and_kill(forks: Sequence[ForkServerProcess], ready: Callable[[], bool], seconds: float) -> bool:
    """Kill all processes at once ``seconds`` after ``ready``; False where the run ended before."""
    deadline, due = time.monotonic() + LONGEST_SECONDS, None
    while any(fork.is_alive() for fork in forks):
        now = time.monotonic()
        assert now < deadline, "a start of a run did not end"
        if due is None and ready():
            due = now + seconds
        if due is not None and now >= due:
            break
        time.sleep(0.0005)
    alive = [fork for fork in forks if fork.is_alive()]
    for fork in alive:
        fork.kill()
    for fork in forks:
        fork.join()
    return bool(alive)


def losses(folder: Path) -> dict[str, float]:
    """Of every step, and those of the result."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    of_steps = {f"step {row['step']}": row["loss"] for row in rows if "loss" in row}
    return {**of_steps, **json.loads((folder / "result.json").read_text())["losses"]}


class Campaign:
    """Kills runs below ``folder``; ``families`` in turn, ``steps`` each."""

    def __init__(self, folder: Path, *, seed: int, families: Sequence[str] = FAMILIES, steps: int = STEPS) -> None:
        self.folder, self.families, self.steps = folder, families, steps
        self.draw = random.Random(seed)
        self.kills: list[Kill] = []
        self.runs: list[Run] = []
        write_texts(folder / "texts.jsonl")
        write_texts(folder / "others.jsonl", seed=1)
        self.whole_seconds = 0.0
        self.undisturbed = {kind: self._undisturbed(kind) for kind in sorted({self._kind(family) for family in families})}

    def run(self, n_kills: int, instants: Sequence[str] = INSTANTS) -> None:
        """Until there were ``n_kills`` and the last run has ended; instants in turn."""
        while len(self.kills) < n_kills:
            family = self.families[len(self.runs) % len(self.families)]
            self._run_to_the_end(family, n_kills, instants)

    def _kind(self, family: str) -> str:
        return "indexed" if family == "fixed" else family

    def _config(self, name: str, kind: str) -> Path:
        path = self.folder / f"{name}.toml"
        places = {"folder": self.folder / name, "cache": self.folder / "cache"}
        texts = {name: self.folder / f"{name}.jsonl" for name in ("texts", "others")}
        path.write_text((CONFIG + TABLES[kind][0]).format(steps=self.steps, **places, **texts))
        return path

    def _undisturbed(self, kind: str) -> Path:
        name = f"undisturbed_{kind}"
        began = time.monotonic()
        forks = start(self._config(name, kind), Layout(), self.folder / f"{name}.txt", TABLES[kind][1])
        assert not wait_and_kill(forks, lambda: False, 0)
        self._ended(forks, name)
        self.whole_seconds = time.monotonic() - began
        return self.folder / name

    def _ended(self, forks: Sequence[ForkServerProcess], name: str) -> None:
        assert all(fork.exitcode == 0 for fork in forks), (self.folder / f"{name}.txt").read_text()[-3000:]

    def _layout(self, family: str) -> Layout:
        if family == "fixed":
            return Layout()
        return Layout(self.draw.choice([1, 2]), self.draw.choice([0, 0, 2]), self.draw.choice([0, 1, 2, 4]))

    def _run_to_the_end(self, family: str, n_kills: int, instants: Sequence[str]) -> None:
        number = len(self.runs)
        name = f"run_{number}_{family}"
        kind = self._kind(family)
        config, run, folder = self._config(name, kind), Run(family), self.folder / name
        while True:
            layout, before, step_before, began = self._layout(family), unfinished(folder), logged_step(folder), time.monotonic()
            instant = instants[len(self.kills) % len(instants)] if len(self.kills) < n_kills else "none"
            ready, seconds = waiter(instant, folder, self.draw, self.whole_seconds) if instant != "none" else ((lambda: False), 0.0)
            forks = start(config, layout, self.folder / f"{name}.txt", TABLES[kind][1])
            run.n_starts += 1
            if not wait_and_kill(forks, ready, seconds):
                break
            self.kills.append(self._looked_at(number, family, layout, instant, began, doing(folder, step_before, before)))
        self._ended(forks, name)
        self._finish(run, folder)
        self.runs.append(run)

    def _looked_at(self, number: int, family: str, layout: Layout, instant: str, began: float, what: str) -> Kill:
        folder = self.folder / f"run_{number}_{family}"
        seconds, storage, alone = time.monotonic() - began, Storage(folder / "checkpoints"), Processes(timedelta(hours=1))
        listed = [look_at(storage, name, how="checksums", processes=alone) for name in storage.folders()]
        committed = [each for each in listed if each.condition != "not committed"]
        return Kill(
            run=number,
            family=family,
            layout=layout,
            instant=instant,
            seconds_after_start=round(seconds, 4),
            step=logged_step(folder),
            doing=what,
            committed=[each.folder for each in committed],
            unusable=[f"{each.folder}: {each.reason}" for each in committed if each.condition != "sound"],
        )

    def _finish(self, run: Run, folder: Path) -> None:
        """Compare an ended run with the undisturbed one."""
        undisturbed = self.undisturbed[self._kind(run.family)]
        ours, theirs = read_ledger(folder), read_ledger(undisturbed)
        report = check_ledger(ours)
        run.n_lost, run.n_doubled, run.problems, run.n_steps_again = (
            report.n_lost,
            report.n_doubled,
            list(report.problems),
            report.n_again,
        )
        run.other_rows = [
            step for step in range(1, self.steps + 1) if ours.steps[step].rows_NI.tolist() != theirs.steps[step].rows_NI.tolist()
        ]
        found, expected = losses(folder), losses(undisturbed)
        assert found.keys() == expected.keys(), f"{folder} has losses of {sorted(found)}"
        run.bitwise = found == expected
        run.largest_relative_difference = max(abs(found[key] / expected[key] - 1) for key in expected)

    def totals(self) -> dict[str, Any]:
        """What all of it comes to."""
        fixed = [run for run in self.runs if run.family == "fixed"]
        return {
            "kills": len(self.kills),
            "runs": len(self.runs),
            "starts": sum(run.n_starts for run in self.runs),
            "steps_made_again": sum(run.n_steps_again for run in self.runs),
            "doing_when_killed": dict(sorted(Counter(kill.doing for kill in self.kills).items())),
            "rows_lost": sum(run.n_lost for run in self.runs),
            "rows_doubled": sum(run.n_doubled for run in self.runs),
            "ledger_problems": sum(len(run.problems) for run in self.runs),
            "steps_with_other_rows": sum(len(run.other_rows) for run in self.runs),
            "unusable_checkpoints": sum(len(kill.unusable) for kill in self.kills),
            "fixed_runs": len(fixed),
            "fixed_runs_with_bitwise_losses": sum(run.bitwise for run in fixed),
            "largest_relative_loss_difference_of_resized_runs": max(
                (run.largest_relative_difference for run in self.runs if run.family != "fixed"), default=0.0
            ),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="a count")
    parser.add_argument("--seed", type=int, default=1, help="of the instants and layouts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        campaign = Campaign(Path(name), seed=args.seed)
        campaign.run(args.kills)
    rows = [*({"run": asdict(run)} for run in campaign.runs), *({"kill": asdict(kill)} for kill in campaign.kills)]
    path = record("kills", rows, settings=vars(args) | {"steps": STEPS, "totals": campaign.totals()})
    print(json.dumps(campaign.totals(), indent=1))
    print(path)


if __name__ == "__main__":
    main()
