"""Runs on several nodes, and runs that break: how soon they end, whom they name, what they leave behind."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes import QUICK, REPOSITORY, Host, Run, cleaned_up, environment, launch, left_over, losses_in, two_hosts
from tests.train.runs import run_forks
from titanarch.train.watch import BEAT_SECONDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

FAILING = """
import os

if os.environ.get("RANK") == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
    from titanarch.train.step import TrainStep

    step_of, made = TrainStep.__call__, []

    def fail(self, step, batches):
        if len(made) == 3:
            raise ValueError("no luck today")
        made.append(step)
        return step_of(self, step, batches)

    TrainStep.__call__ = fail
"""
"""What Python runs at its start: process 1 fails in its fourth step after it was started again."""

OPTIONS = ("--checkpoint.interval=2", "--checkpoint.async_mode=disabled")
ENDLESS = "--training.steps=100000"


def on_two_hosts(folder: Path, hosts: tuple[Host, Host], steps: str) -> list[Run]:
    """A launcher of one process on each host, which meet on the first."""
    variables = {"NNODES": "2", "NGPU": "1", "RDZV_ENDPOINT": f"{hosts[0].address}:29417"}
    return [launch(folder, *OPTIONS, steps, host=host, NODE_RANK=str(n), **variables) for n, host in enumerate(hosts)]


def losses_of_one_process(folder: Path, steps: str) -> dict[int, float]:
    arguments = ["train", "--config", "train_configs/debug.toml", f"--job.dump_folder={folder}", *QUICK, *OPTIONS, steps]
    (done,) = run_forks([(arguments, environment())])
    assert done.returncode == 0, done.stderr
    return losses_in(folder)


def test_two_hosts_train_break_and_go_on(tmp_path: Path) -> None:
    """Each host has a launcher and network of its own. Losses are one process's, also after one host's process was killed."""
    folder = tmp_path / "run"
    with two_hosts() as hosts, cleaned_up(folder):
        before = hosts[1].received_bytes()
        first, second = on_two_hosts(folder, hosts, ENDLESS)
        first.wait_for_step(3)
        time.sleep(3 * BEAT_SECONDS)  # the other host knows of this one what its last beat said
        os.kill(first.workers()[1], signal.SIGKILL)
        killed = time.monotonic()
        (status, _, err), (second_status, _, second_err) = first.end(), second.end()
        print(f"killed on one of two hosts: both launchers ended after {time.monotonic() - killed:.1f} s")
        assert time.monotonic() - killed < 60
        assert (status, second_status) == (1, 1)
        words = r"process 1 of 2 \(pid \d+\) was killed by SIGKILL \(.*\), after step (\d+)\n"
        told = re.search(words, second_err)
        assert told, second_err
        assert int(told[1]) in (max(losses_in(folder)), max(losses_in(folder)) + 1)
        words = r"process 1 of 2 \(on .*, pid \d+\) stopped answering: it was killed or hangs, after step \d+, or a later one\n"
        assert re.search(words, err), err
        assert left_over(folder) == {}
        steps = f"--training.steps={max(losses_in(folder)) + 2}"
        runs = on_two_hosts(folder, hosts, steps)
        ends = [run.end() for run in runs]
        assert [status for status, _, _ in ends] == [0, 0], ends
        assert "resumed from" in "".join(out + err for _, out, err in ends)
        assert '"n_processes": 2' in (folder / "result.json").read_text()
        assert hosts[1].received_bytes() - before > 2_000_000, "gradients did not cross the cable"
    found, expected = losses_in(folder), losses_of_one_process(tmp_path / "alone", steps)
    assert found == pytest.approx(expected, rel=2e-3)  # another order of sums tells more and more; other rows differ by 1e-2
    early = range(1, min(10, max(found)) + 1)  # the killed run had made three steps at least
    assert [found[step] for step in early] == pytest.approx([expected[step] for step in early], rel=2e-6)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run of two processes that has begun."""
    folder = tmp_path_factory.mktemp("endless") / "run"
    with cleaned_up(folder):
        yield launch(folder, ENDLESS, "--checkpoint.enable=false", NGPU="2")


def test_a_process_that_hangs_ends_the_run(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The launcher's last words name the process, what happened to it and its last step; nothing is left."""
    folder = tmp_path / "run"
    with cleaned_up(folder):
        run = launch(folder, ENDLESS, "--checkpoint.enable=false", "--comm.train_timeout_seconds=8", NGPU="2")
        run.wait_for_step(3)
        os.kill(run.workers()[1], signal.SIGSTOP)
        broken = time.monotonic()
        request.getfixturevalue("endless")  # the next test's run begins while this one is waited for
        status, _, err = run.end()
        seconds = time.monotonic() - broken
        print(f"stopped: ended after {seconds:.1f} s")
        assert status == 1
        assert seconds < 60
        words = r"process 1 of 2 \(on .*, pid \d+\) stopped answering: it was killed or hangs, after step (\d+)\n"
        told = re.search(rf"titanarch: the run broke after \d+ s: {words}", err)
        assert told, err
        assert int(told[1]) in (max(losses_in(folder)), max(losses_in(folder)) + 1)  # a step can end before its row is written
        assert left_over(folder) == {}


def test_processes_do_not_outlive_their_launcher(endless: Run) -> None:
    endless.wait_for_step(2)
    assert len(endless.workers()) == 2
    endless.process.kill()  # run_train.sh has become the launcher itself
    assert left_over(endless.folder) == {}


def test_processes_start_again_and_fail_again(tmp_path: Path) -> None:
    """MAX_RESTARTS=1: after one process was killed all start again and resume; when one raises, that is the end. With the check before."""
    folder = tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(FAILING)
    with cleaned_up(folder):
        run = launch(folder, *OPTIONS, ENDLESS, checked=True, NGPU="2", MAX_RESTARTS="1", PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
        run.wait_for_step(3)
        os.kill(run.workers()[0], signal.SIGKILL)
        status, out, err = run.end()
        assert status == 1
        resumed = re.search(r"resumed from .* at step (\d+)", out + err)
        assert resumed, out + err
        last = int(resumed[1]) + 3
        words = r"titanarch: the run broke after \d+ s: process 1 of 2 \(pid \d+\) failed: ValueError: no luck today, after step (\d+)\n"
        told = re.search(words, err)
        assert told, err
        assert int(told[1]) == last
        assert "ValueError: no luck today\ntitanarch: 1 other process" in err, "the traceback of a process that is not shown"
        assert sorted(losses_in(folder)) in (list(range(1, last)), list(range(1, last + 1)))
        assert left_over(folder) == {}
