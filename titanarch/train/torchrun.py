"""``python -m titanarch.train.torchrun``: torchrun with the same options, whose last words name what broke the run.

torchrun shows a table of all its processes, in which those that it ended itself, and those that only noticed the death
of another, stand beside the one that broke the run; none says how far the run had come.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError

from titanarch.train.stopping import SIGNALS, status_of
from titanarch.train.watch import STEP_FILE, LostProcessError, after_step, noted_step

SHOWN_LINES = 25
TOLD = {status_of(number): number for number in SIGNALS}
"""Statuses of processes that saved and ended because they were told to."""
SECONDS_TO_SAVE = 300
"""How long processes have for that once the launcher was told to end, unless TORCH_ELASTIC_SHUTDOWN_TIMEOUT says another time."""
LATER_SECONDS = 20
"""A kill so long after the first failure is the launcher's own, of a process that did not end when told to."""


@dataclass(frozen=True)
class Failed:
    """A process of this node that ended as it should not."""

    rank: int
    failure: ProcessFailure
    folder: Path | None
    """Of its logs."""

    @property
    def error(self) -> str | None:
        """The first line of what it raised; None where it raised nothing that was recorded."""
        message = self.failure.error_file_data.get("message")
        return str(message["message"]).splitlines()[0] if isinstance(message, Mapping) else None

    @property
    def is_consequence(self) -> bool:
        return self.error is not None and self.error.startswith(f"{LostProcessError.__name__}: ")

    @property
    def last_step(self) -> int | None:
        return None if self.folder is None else noted_step(self.folder / STEP_FILE)

    def told(self, world_size: int) -> str:
        """What happened to it, in a sentence."""
        if self.is_consequence and self.error is not None:
            return self.error.removeprefix(f"{LostProcessError.__name__}: ")
        code = self.failure.exitcode
        what = f"was killed by {self.failure.signal_name()}" if code < 0 else f"ended with status {code}"
        if code in TOLD:
            what = f"was told to end by {TOLD[code].name}, and saved"
        if code == -signal.SIGKILL:
            what += " (by the system, for want of memory, if nobody did it)"
        if self.error is not None:
            what = f"failed: {self.error}"
        return f"process {self.rank} of {world_size} (pid {self.failure.pid}) {what}, {after_step(self.last_step)}"


def by_blame(failed: Iterable[Failed]) -> list[Failed]:
    """The processes, those first that broke the run: killed by a signal, then failed on their own, then by others, then ended."""
    listed = list(failed)
    first = min(each.failure.timestamp for each in listed)

    def key(each: Failed) -> int:
        code = each.failure.exitcode
        if each.error is not None:
            return 2 if each.is_consequence else 1
        late = code == -signal.SIGKILL and each.failure.timestamp > first + LATER_SECONDS
        return 3 if code == -signal.SIGTERM or late else 0 if code < 0 else 1

    return sorted(listed, key=lambda each: (key(each), each.failure.timestamp))


def last_words(failed: Sequence[Failed], *, world_size: int, shown: Iterable[int], seconds: float) -> str:
    """The report on a run that broke. ``shown``: the local ranks whose output the reader has seen already."""
    worst, n_others = by_blame(failed)[0], len(failed) - 1
    verb = "ended" if worst.failure.exitcode in TOLD else "broke"
    lines = [f"the run {verb} after {seconds:.0f} s: {worst.told(world_size)}"]
    log = None if worst.folder is None else worst.folder / "stderr.log"
    said = log.read_text(errors="replace").splitlines() if log is not None and log.is_file() else []
    if said and worst.failure.local_rank not in shown:
        lines += [f"the last lines of {log}:", *(f"  {line}" for line in said[-SHOWN_LINES:])]
    elif log is not None:
        lines.append(f"its output is in {log.parent}")
    if n_others:
        lines.append(f"{n_others} other process{'es' if n_others > 1 else ''} of this node ended with it")
    lines.append("the same command goes on from the newest checkpoint")
    return "\n".join(f"titanarch: {line}" for line in lines)


def folders(log_folder: Path) -> dict[int, Path]:
    """The folder of each local rank's logs, of the last time that the processes were started."""
    attempts = sorted(log_folder.glob("*/attempt_*"), key=lambda path: int(path.name.removeprefix("attempt_")))
    return {int(path.name): path for path in attempts[-1].iterdir() if path.name.isdecimal()} if attempts else {}


def main(arguments: Sequence[str]) -> int:
    """Run torchrun; the exit status: 1 where the run broke, 128 and its number after a signal."""
    options = torchrun.parse_args(list(arguments))
    options.signals_to_handle = ",".join(number.name for number in (*SIGNALS, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    started = time.monotonic()
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        logs = folders(Path(options.log_dir)) if options.log_dir else {}
        failed = [Failed(rank, failure, logs.get(failure.local_rank)) for rank, failure in error.failures.items()]
        shown = [int(rank) for rank in options.local_ranks_filter.split(",") if rank]
        world_size = int(options.nnodes.split(":")[-1]) * int(options.nproc_per_node)
        print(last_words(failed, world_size=world_size, shown=shown, seconds=time.monotonic() - started), file=sys.stderr)
        code = by_blame(failed)[0].failure.exitcode
        return code if code in TOLD else 1
    except RendezvousError as error:
        print(f"titanarch: the nodes did not meet, or lost each other: {error}", file=sys.stderr)
        print("titanarch: node 0, whose launcher holds the meeting place, may have ended; its output says why", file=sys.stderr)
        return 1
    except SignalException as error:
        print(f"titanarch: ended by {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval.value
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
