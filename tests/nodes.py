"""Runs started through run_train.sh for the tests of nodes and failures, and hosts made of network namespaces."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

QUICK = (
    "--training.mixed_precision_param=float32",
    "--validation.enable=false",
    "--data.allow_repeat=true",
    "--evaluation.enable=false",
    '--metrics.sinks=["jsonl","progress"]',
)
"""Overrides of debug.toml for runs that are about processes: fp32, and nothing but steps, as many as they like."""


@dataclass
class Run:
    """A launcher and its processes; ``folder`` is the run's."""

    folder: Path
    process: subprocess.Popen[str]

    def wait_for_step(self, step: int, seconds: float = 400.0) -> None:
        """Until the row of ``step`` is written; fails with the output where the run ends before."""
        deadline = time.monotonic() + seconds
        while max(losses_in(self.folder), default=0) < step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                pytest.fail(f"step {step} was not reached; status {self.process.returncode}\n{''.join(self.process.communicate())}")
            time.sleep(0.05)

    def workers(self) -> dict[int, int]:
        """The ids of its living training processes by rank; data workers and the like are in none of the ranks' groups."""
        found = {}
        for pid, variables in processes_of(self.folder).items():
            if "RANK" in variables and os.getpgid(pid) == pid:
                found[int(variables["RANK"])] = pid
        return found

    def end(self, seconds: float = 400.0) -> tuple[int, str, str]:
        """Status, stdout and stderr, once it has ended."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err


def losses_in(folder: Path) -> dict[int, float]:
    """The losses that the run in ``folder`` has logged so far, by step."""
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def processes_of(folder: Path) -> dict[int, dict[str, str]]:
    """The environment of every living process whose command names ``folder``, by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                found[int(entry.name)] = dict(each.split("=", 1) for each in variables if "=" in each)
        except OSError:  # it has just ended, or is another user's
            continue
    return found


def left_over(folder: Path, seconds: float = 20.0) -> dict[int, dict[str, str]]:
    """The processes of the run that still live after ``seconds``; {} as soon as there are none."""
    deadline = time.monotonic() + seconds
    while (found := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def environment(**variables: str) -> dict[str, str]:
    """The tests' own environment without its launcher, on the CPU, with the tests' interpreter."""
    fixed = {"TITANARCH_PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed, **variables}


def unchecked_python(folder: Path) -> str:
    """The tests' interpreter, but for the check before a launch, which takes as long as the start of a process; kept in ``folder``."""
    path = folder / "unchecked-python"
    if not path.exists():
        path.write_text(f'#!/usr/bin/env bash\n[[ "$*" == "-m titanarch config check "* ]] || exec "{sys.executable}" "$@"\n')
        path.chmod(0o755)
    return str(path)


def launch(folder: Path, *overrides: str, host: "Host | None" = None, checked: bool = False, **variables: str) -> Run:
    """run_train.sh on debug.toml, in a session of its own, on ``host`` or right here. ``checked``: as always, else without the check."""
    command = ["bash", "run_train.sh", "--config", "train_configs/debug.toml", f"--job.dump_folder={folder}", *QUICK, *overrides]
    if host is not None:
        command = ["ip", "netns", "exec", host.name, *command]
        variables = {"LOCAL_ADDR": host.address, "GLOO_SOCKET_IFNAME": host.interface, **variables}
    if not checked:
        variables = {"TITANARCH_PYTHON": unchecked_python(folder.parent), **variables}
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(TMPDIR=str(folder.parent), **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return Run(folder, process)


@contextmanager
def cleaned_up(folder: Path) -> Iterator[None]:
    """Whatever happens inside, no process of the run in ``folder`` survives."""
    try:
        yield
    finally:
        for pid in processes_of(folder):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@dataclass(frozen=True)
class Host:
    """A network namespace: it has an address and an interface of its own, and nothing else in common with the other."""

    name: str
    interface: str
    address: str

    def received_bytes(self) -> int:
        """What came in over the interface so far."""
        path = f"/sys/class/net/{self.interface}/statistics/rx_bytes"
        return int(_ip("netns", "exec", self.name, "cat", path).stdout)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check, timeout=20)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two network namespaces joined by a cable; removed afterwards with all that runs in them. Skips where it may not."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (Debian's iproute2) to make network namespaces")
    mark = f"{os.getpid() % 100_000:05d}"
    hosts = tuple(Host(f"titanarch-{mark}{each}", f"ta{mark}{each}", f"10.213.77.{n}") for n, each in ((1, "a"), (2, "b")))
    try:
        for host in hosts:
            made = _ip("netns", "add", host.name, check=False)
            if made.returncode:
                pytest.skip(f"the kernel or its permissions forbid network namespaces: {made.stderr.strip()}")
        ends = [("name", host.interface, "netns", host.name) for host in hosts]
        cable = _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1], check=False)
        if cable.returncode:
            pytest.skip(f"the kernel has no virtual cables (veth): {cable.stderr.strip()}")
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.name, "link", "set", host.interface, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            for pid in _ip("netns", "pids", host.name, check=False).stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            _ip("netns", "del", host.name, check=False)
