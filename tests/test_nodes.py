"""Runs on several nodes, and runs that break: how soon they end, whom they name, what they leave behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.nodes import QUICK, REPOSITORY, cleaned_up, environment, launch, left_over, two_hosts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

FAILING = """
import os

if os.environ.get("RANK") == "1":
    from titanarch.train.step import TrainStep

    step_of = TrainStep.__call__

    def fail(self, step, batches):
        if step == 4:
            raise ValueError("no luck today")
        return step_of(self, step, batches)

    TrainStep.__call__ = fail
"""


def test_two_hosts_train_break_and_go_on(tmp_path: Path) -> None:
    """Each host has a launcher and network of its own. Losses are one process's, also after one host's process was killed."""
    folder, options = tmp_path / "run", ("--training.steps=6", "--checkpoint.interval=2", "--checkpoint.async_mode=disabled")
    alone = tmp_path / "alone"
    command = [sys.executable, "-m", "titanarch", "train", "--config", "train_configs/debug.toml", f"--job.dump_folder={alone}"]
    with two_hosts() as hosts, cleaned_up(folder):

        def start(*more: str) -> list:  # type: ignore[type-arg]
            variables = {"NNODES": "2", "NGPU": "1", "RDZV_ENDPOINT": f"{hosts[0].address}:29417"}
            return [launch(folder, *options, *more, host=host, NODE_RANK=str(n), **variables) for n, host in enumerate(hosts)]

        before = hosts[1].received_bytes()
        runs = start("--training.steps=100000")
        runs[0].wait_for_step(3)
        os.kill(runs[0].workers()[1], signal.SIGKILL)
        killed = time.monotonic()
        ends = [run.end() for run in runs]
        assert time.monotonic() - killed < 60
        assert [status for status, _, _ in ends] == [1, 1]
        step = max(runs[0].losses())
        assert re.search(rf"process 1 of 2 \(pid \d+\) was killed by SIGKILL.*, after step {step}\n", ends[1][2])
        assert re.search(
            r"process 1 of 2 .* stopped answering: it was killed or hangs, after step \d+\n|node 0, whose launcher", ends[0][2]
        )
        assert left_over(folder) == {}
        runs = start()
        reference = subprocess.run([*command, *QUICK, *options], cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
        assert reference.returncode == 0, reference.stderr
        ends = [run.end(200) for run in runs]
        assert [status for status, _, _ in ends] == [0, 0], ends
        assert "resumed from" in "".join(out + err for _, out, err in ends)
        assert hosts[1].received_bytes() - before > 2 * 1_000_000, "gradients did not cross the cable"
    expected = runs[0].__class__(alone, runs[0].process).losses()
    assert sorted(expected) == [1, 2, 3, 4, 5, 6]
    assert runs[0].losses() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(
    ("n_processes", "how", "words"),
    [
        ("4", signal.SIGKILL, r"process 1 of 4 \(pid \d+\) was killed by SIGKILL .*, after step (\d+)\n"),
        ("2", "raise", r"process 1 of 2 \(pid \d+\) failed: ValueError: no luck today, after step (3)\n"),
        ("2", signal.SIGSTOP, r"process 1 of 2 \(on .*, pid \d+\) stopped answering: it was killed or hangs, after step (\d+)\n"),
    ],
)
def test_a_process_that_breaks_ends_the_run(tmp_path: Path, n_processes: str, how: signal.Signals | str, words: str) -> None:
    """The launcher's last words name the process, what happened to it and its last step; nothing is left."""
    folder, variables = tmp_path / "run", {}
    if how == "raise":
        (tmp_path / "sitecustomize.py").write_text(FAILING)
        variables = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    with cleaned_up(folder):
        options = ("--training.steps=100000", "--checkpoint.enable=false", "--comm.train_timeout_seconds=8")
        run = launch(folder, *options, NGPU=n_processes, **variables)
        run.wait_for_step(3)
        if isinstance(how, signal.Signals):
            os.kill(run.workers()[1], how)
        broken = time.monotonic()
        status, _, err = run.end()
        seconds = time.monotonic() - broken
        print(f"{how} in {n_processes} processes: ended after {seconds:.1f} s")
        assert status == 1
        assert seconds < 60
        told = re.search(rf"titanarch: the run broke after \d+ s: {words}", err)
        assert told, err
        assert int(told[1]) in (max(run.losses()), max(run.losses()) + 1)  # a step can end before its row is written
        assert left_over(folder) == {}


def test_processes_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with cleaned_up(folder):
        run = launch(folder, "--training.steps=100000", "--checkpoint.enable=false", NGPU="2")
        run.wait_for_step(2)
        assert len(run.workers()) == 2
        run.process.kill()  # run_train.sh has become the launcher itself
        assert left_over(folder) == {}


def test_processes_start_again_and_go_on(tmp_path: Path) -> None:
    """MAX_RESTARTS: after a death the launcher starts all processes once more, which resume."""
    folder = tmp_path / "run"
    with cleaned_up(folder):
        options = ("--training.steps=8", "--checkpoint.interval=2", "--checkpoint.async_mode=disabled")
        run = launch(folder, *options, NGPU="1", MAX_RESTARTS="1")
        run.wait_for_step(3)
        os.kill(run.workers()[0], signal.SIGKILL)
        status, out, err = run.end(200)
        assert status == 0, err
        assert "resumed from" in out + err
        assert sorted(run.losses()) == list(range(1, 9))
        assert left_over(folder) == {}
