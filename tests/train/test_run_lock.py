"""Two runs on one folder: who has it is named, and what a dead owner left behind keeps nobody out for longer than it must."""

import errno
import fcntl
import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.train.runs import write_config
from titanarch.cli.main import main
from titanarch.config.errors import ConfigError
from titanarch.train.run_lock import Owner, RunLock


def write_owner(path: Path, host: str, process: int) -> None:
    path.write_text(json.dumps({"host": host, "process": process, "started": "2026-01-02T03:04:05+00:00"}))


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def no_locks(_descriptor: int, _operation: int) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def held(_descriptor: int, _operation: int) -> None:
    raise BlockingIOError


def test_the_owner_is_named_with_host_process_and_start(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run.lock")
    owner = Owner.from_bytes((tmp_path / "run.lock").read_bytes())
    assert owner is not None
    assert (owner.host, owner.process) == (socket.gethostname(), os.getpid())
    with pytest.raises(
        ConfigError, match=rf"in use by process {os.getpid()} on {owner.host}, started at {owner.started[:10]}T.*; wait for it"
    ):
        RunLock(tmp_path / "run.lock")
    lock.release()
    assert (tmp_path / "run.lock").read_bytes() == b""
    RunLock(tmp_path / "run.lock").release()


def test_an_owner_on_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.lock"
    write_owner(path, "node7", 12)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ConfigError, match=r"process 12 on node7.*its lock ends with its lease at the file server"),
    ):
        patch.setattr(fcntl, "flock", held)
        RunLock(path)
    (tmp_path / "heartbeat.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"taken over from process 12 on node7.*its last step was \d+ s ago.*stop one of the two"):
        RunLock(path).release()


def test_a_file_system_without_locks_goes_by_the_name_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "run.lock"
    for host, process in (("node7", 12), (socket.gethostname(), os.getppid())):
        write_owner(path, host, process)
        with pytest.raises(ConfigError, match=rf"in use by process {process} on {host}.*no locks.*then remove .*run\.lock and start again"):
            RunLock(path)
    write_owner(path, socket.gethostname(), dead_process())
    with pytest.warns(UserWarning, match="this file system has no locks; run.lock names this process"):
        lock = RunLock(path)
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on"):
        RunLock(path)
    lock.release()
    with pytest.warns(UserWarning, match="no locks"):
        RunLock(path).release()


def test_a_url_is_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, "run", tmp_path / "cache")
    assert main(["train", "--config", str(config), "--job.dump_folder", "s3://bucket/run"]) == 2
    assert "dump_folder: a run is locked and appended to" in capsys.readouterr().err
