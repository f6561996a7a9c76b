"""The launcher's last words: who is named of several that failed, and what is said."""

import argparse
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.launcher.api import LaunchConfig

from titanarch.train.torchrun import LATER_SECONDS, SECONDS_TO_SAVE, Failed, by_blame, folders, last_words, main


def failed(tmp_path: Path, rank: int, code: int, *, error: str = "", at: int = 1000, step: int | None = None) -> Failed:
    """Process ``rank`` that ended with ``code``, after it raised ``error``."""
    folder = tmp_path / "none_x/attempt_0" / str(rank)
    folder.mkdir(parents=True)
    if error:
        message = {"message": error, "extraInfo": {"py_callstack": "Traceback", "timestamp": str(at)}}
        (folder / "error.json").write_text(json.dumps({"message": message}))
    if step is not None:
        (folder / "last_step").write_text(f"{step:<20}")
    failure = ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=code, error_file=str(folder / "error.json"))
    failure.timestamp = at
    return Failed(rank, failure, folder)


LOST = "LostProcessError: process 7 of 8 (on far, pid 5) stopped answering: it was killed or hangs, after step 3"
KILLED, ENDED = -signal.SIGKILL, -signal.SIGTERM


@pytest.mark.parametrize(
    ("cases", "worst"),
    [
        ([{"code": ENDED}, {"code": KILLED, "at": 1001}], 1),  # the launcher ends the others by SIGTERM
        ([{"code": 1, "error": LOST}, {"code": ENDED}, {"code": KILLED, "at": 1002}], 2),
        ([{"code": 1, "error": LOST}, {"code": 1, "error": "ValueError: x", "at": 1003}], 1),
        ([{"code": ENDED, "at": 1003}, {"code": ENDED, "error": "ValueError: x", "at": 1002}], 1),  # it was still on its way out
        ([{"code": ENDED}, {"code": 1, "error": LOST, "at": 1002}], 1),
        ([{"code": 1, "error": "ValueError: x"}, {"code": KILLED, "at": 1001 + LATER_SECONDS}], 0),  # of the launcher's own kill
        ([{"code": -signal.SIGSEGV, "at": 1001}, {"code": 1, "error": "ValueError: x"}], 0),
        ([{"code": ENDED}, {"code": 3, "at": 1002}], 1),
    ],
)
def test_who_is_to_blame(tmp_path: Path, cases: list[dict[str, Any]], worst: int) -> None:
    assert by_blame([failed(tmp_path, rank, **case) for rank, case in enumerate(cases)])[0].rank == worst


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"code": KILLED, "step": 12}, "was killed by SIGKILL (by the system, for want of memory, if nobody did it), after step 12"),
        ({"code": -signal.SIGSEGV}, "was killed by SIGSEGV, before its first step was done"),
        ({"code": 143, "step": 8}, "was told to end by SIGTERM, and saved, after step 8"),
        ({"code": 3, "step": 0}, "ended with status 3, after step 0"),
        ({"code": 1, "error": "ValueError: x\ny", "step": 4}, "failed: ValueError: x, after step 4"),
    ],
)
def test_what_is_said(tmp_path: Path, case: dict[str, Any], words: str) -> None:
    assert failed(tmp_path, 2, **case).told(8) == f"process 2 of 8 (pid 102) {words}"


def test_what_is_said_of_another_process(tmp_path: Path) -> None:
    assert failed(tmp_path, 2, 1, error=LOST).told(8) == LOST.removeprefix("LostProcessError: ")


def test_output_that_nobody_saw_is_shown(tmp_path: Path) -> None:
    processes = [failed(tmp_path, 0, ENDED), failed(tmp_path, 1, 1, error="ValueError: x", step=4), failed(tmp_path, 2, ENDED)]
    for each in processes:
        assert each.folder is not None
        (each.folder / "stderr.log").write_text("".join(f"line {n}\n" for n in range(100)))
    told = last_words(processes, world_size=3, shown=[0], seconds=3.4).splitlines()
    assert told[0] == "titanarch: the run broke after 3 s: process 1 of 3 (pid 101) failed: ValueError: x, after step 4"
    assert told[1] == f"titanarch: the last lines of {tmp_path}/none_x/attempt_0/1/stderr.log:"
    assert told[2:-2] == [f"titanarch:   line {n}" for n in range(75, 100)]
    assert told[-2] == "titanarch: 2 other processes of this node ended with it"
    seen = last_words(processes, world_size=3, shown=[1], seconds=3.4).splitlines()
    assert seen[1:-2] == [f"titanarch: its output is in {tmp_path}/none_x/attempt_0/1"]


def test_the_logs_are_those_of_the_last_attempt(tmp_path: Path) -> None:
    assert folders(tmp_path) == {}
    for attempt in (0, 9, 10):
        for name in ("0", "1"):
            (tmp_path / f"none_x/attempt_{attempt}" / name).mkdir(parents=True)
    (tmp_path / "none_x/attempt_10/filtered_stderr.log").touch()
    assert folders(tmp_path) == {rank: tmp_path / f"none_x/attempt_10/{rank}" for rank in (0, 1)}


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (None, 0, ""),
        (SignalException("told to end", signal.SIGTERM), 143, "titanarch: ended by SIGTERM\n"),
        (SignalException("told to end", signal.SIGUSR1), 138, "titanarch: ended by SIGUSR1\n"),
        (RendezvousConnectionError("the store is gone"), 1, "titanarch: the nodes did not meet, or lost each other: the store is gone\n"),
    ],
)
def test_the_status_of_the_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception | None, status: int, words: str
) -> None:
    def run(options: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr("torch.distributed.run.run", run)
    assert main(["--nnodes=2", "-m", "titanarch", "train", "--config", "a.toml"]) == status
    assert capsys.readouterr().err.startswith(words)


def test_the_launcher_reports_the_process_that_broke_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: object) -> None:
        raise ChildFailedError("titanarch", {8: failed(tmp_path, 0, ENDED).failure, 9: failed(tmp_path, 1, KILLED, step=5).failure})

    monkeypatch.setattr("torch.distributed.run.run", run)
    arguments = ["--nnodes=2", "--nproc-per-node=8", f"--log-dir={tmp_path}", "--local-ranks-filter=0", "-m", "titanarch", "train"]
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert "process 9 of 16 (pid 101) was killed by SIGKILL" in told
    assert "after step 5\n" in told


def test_processes_that_were_told_to_end_give_the_launcher_their_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher hands both signals on, and waits for the save."""
    given: list[argparse.Namespace] = []

    def run(options: argparse.Namespace) -> None:
        given.append(options)
        raise ChildFailedError("titanarch", {0: failed(tmp_path, 0, ENDED).failure, 1: failed(tmp_path, 1, 138, step=5).failure})

    monkeypatch.setattr("torch.distributed.run.run", run)
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert main(["--nproc-per-node=2", f"--log-dir={tmp_path}", "-m", "titanarch", "train"]) == 138
    assert re.search(r"the run ended after 0 s: process 1 of 2 .* was told to end by SIGUSR1, and saved", capsys.readouterr().err)
    assert {"SIGTERM", "SIGUSR1", "SIGINT"} <= set(given[0].signals_to_handle.split(","))
    assert LaunchConfig(1, 1, 1).shutdown_timeout == SECONDS_TO_SAVE
