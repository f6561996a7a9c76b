"""How long a save holds training up: in the background, from another process, and waited for; and what checksums cost.

    python benchmarks/checkpoints.py [--megabytes 256] [--saves 5] [--process]

A state of ``--megabytes`` is saved into a temporary folder while a loop multiplies matrices as training would. Of each save
are kept: the seconds that the call took, those of the upload, and those of every turn of the loop that followed, until the
upload ended. Modes alternate, save by save. ``excess_seconds``: by how much the turns beside an upload took longer, together,
than as many turns of the median length without one. Then the writing without checksums alternates with that with them, and the
reading of the files with checksums is timed.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import record

from titanarch.checkpoint import hashing
from titanarch.checkpoint.config import CheckpointConfig
from titanarch.checkpoint.hashing import sha256_of
from titanarch.checkpoint.store import Checkpointer

N_TENSORS = 16
WIDTH = 512
QUIET_TURNS = 50


def state_of(megabytes: int) -> dict[str, Any]:
    """A model of so many tensors of one size, fp32."""
    size = megabytes * 10**6 // (4 * N_TENSORS)
    return {"model": {f"w{i}": torch.randn(size) for i in range(N_TENSORS)}}


def turn(x: torch.Tensor) -> float:
    """A piece of training's work; seconds."""
    started = time.perf_counter()
    for _ in range(4):
        x @ x
    return time.perf_counter() - started


def one_save(saver: Checkpointer, step: int, state: dict[str, Any], work: torch.Tensor) -> dict[str, Any]:
    """A save, and the work beside its upload."""
    quiet = [turn(work) for _ in range(QUIET_TURNS)]
    started = time.perf_counter()
    saver.save(step, state, config_text="")
    call_seconds, turns = time.perf_counter() - started, []
    saved = saver.take_saved()
    while not saved:
        turns.append(turn(work))
        saver.maybe_wait()
        saved = saver.take_saved()
    excess = sum(turns) - len(turns) * statistics.median(quiet)
    return {
        "mode": saver.config.async_mode,
        "call_seconds": call_seconds,
        "stall_seconds": saved[0].stall_seconds,
        "upload_seconds": saved[0].upload_seconds,
        "excess_seconds": excess,
        "turn_seconds_beside": turns,
        "turn_seconds_quiet": quiet,
    }


@contextmanager
def no_checksums() -> Iterator[None]:
    """Writing that hashes nothing: the digests are those of no bytes."""

    class Nothing:
        def update(self, data: object) -> None:
            """Pass over the data."""

        def hexdigest(self) -> str:
            return ""

    class Library:
        sha256 = Nothing

    kept = hashing.hashlib
    hashing.hashlib = Library  # type: ignore[assignment,attr-defined]
    try:
        yield
    finally:
        hashing.hashlib = kept  # type: ignore[attr-defined]


def checksum_costs(folder: Path, state: dict[str, Any], saves: int) -> list[dict[str, Any]]:
    """Uploads with and without checksums, in the order A B B A, then the reading of what the last one wrote."""
    saver = Checkpointer(CheckpointConfig(async_mode="disabled", keep_latest_k=1), folder)
    samples = []
    for number in range(1, 1 + 2 * saves + 1):
        hashed = number % 4 in (0, 1)
        if hashed:
            saver.save(number, state, config_text="")
        else:
            with no_checksums():
                saver.save(number, state, config_text="")
        saved = saver.take_saved()[0]
        if number > 1:  # the first warms up
            samples.append({"checksums": hashed, "upload_seconds": saved.upload_seconds, "bytes": saved.n_bytes})
    saver.close()
    files = sorted(folder.glob("checkpoints/*/*.distcp"))
    started = time.perf_counter()
    for path in files:
        with path.open("rb") as stream:
            sha256_of(stream)
    n_bytes = sum(path.stat().st_size for path in files)
    return [*samples, {"read_and_hash_seconds": time.perf_counter() - started, "bytes": n_bytes}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="size of the state")
    parser.add_argument("--saves", type=int, default=5, help="counted saves of each mode, after one that is not")
    parser.add_argument("--process", action="store_true", help="measure the mode 'process' too, which starts another interpreter")
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state, work = state_of(args.megabytes), torch.randn(WIDTH, WIDTH)
    modes = ["async", "disabled", *(["process"] if args.process else [])]
    with tempfile.TemporaryDirectory() as name:
        savers = [Checkpointer(CheckpointConfig(async_mode=mode, keep_latest_k=1), Path(name, mode)) for mode in modes]
        samples = [one_save(saver, 1 + i, state, work) for i in range(args.saves + 1) for saver in savers][len(modes) :]
        for saver in savers:
            saver.close()
        costs = checksum_costs(Path(name, "checksums"), state, args.saves)
    path = record("checkpoints", [*samples, *costs], settings=vars(args) | {"n_tensors": N_TENSORS})
    dist.destroy_process_group()
    report(samples, costs)
    print(path)


def report(samples: list[dict[str, Any]], costs: list[dict[str, Any]]) -> None:
    """Medians for people; the raw samples are in the file."""
    medians = {
        mode: {key: statistics.median(s[key] for s in samples if s["mode"] == mode) for key in samples[0] if key.endswith("_seconds")}
        for mode in dict.fromkeys(sample["mode"] for sample in samples)
    }
    synchronous = medians["disabled"]["call_seconds"]
    for mode, median in medians.items():
        share = 100 * median["call_seconds"] / synchronous
        shown = ", ".join(f"{key.removesuffix('_seconds')} {value:.3f} s" for key, value in median.items())
        print(f"{mode}: {shown}; the call is {share:.1f} % of a synchronous save's")
    *writes, reading = costs
    seconds = {hashed: statistics.median(w["upload_seconds"] for w in writes if w["checksums"] == hashed) for hashed in (True, False)}
    rates = {hashed: writes[0]["bytes"] / 1e6 / value for hashed, value in seconds.items()}
    print(
        f"writing with checksums {seconds[True]:.3f} s ({rates[True]:.0f} MB/s), without {seconds[False]:.3f} s "
        f"({rates[False]:.0f} MB/s); reading and comparing {reading['bytes'] / 1e6 / reading['read_and_hash_seconds']:.0f} MB/s"
    )


if __name__ == "__main__":
    main()
