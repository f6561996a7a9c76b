"""The table at the end of a run, and the record of what it ran on."""

import io
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from titanarch.train.metrics.environment import environment_record, git_state
from titanarch.train.metrics.results import format_result, print_result

RESULT = {
    "status": "finished",
    "run": "runs/small",
    "step": 1000,
    "tokens": 4_096_000,
    "parameters": 13_832_192,
    "training_flops": 3.4e14,
    "wall_seconds": 3725.2,
    "tokens_per_second": 3702.4,
    "mfu": 0.3812,
    "peak_memory_gib": 1.234,
    "losses": {"train": 5.4321, "validation": None},
    "evaluation": [
        {"length": 128, "rule": "all_positions", "loss": 5.5, "perplexity": 244.69193},
        {"length": 2048, "rule": "same_targets", "loss": 5.25, "perplexity": 190.56627, "bits_per_byte": 1.9},
    ],
    "environment": {"device": "a CPU", "commit": "abc", "torch": "2.13.0"},
}

EXPECTED = """\
status             finished
run                runs/small
step               1,000
tokens             4,096,000
parameters         13,832,192
training flops     340.00 TFLOP
wall               1:02:05
tokens per second  3,702
mfu                38.1 %
peak memory        1.23 GiB
train loss         5.4321
validation loss    not finite
device             a CPU
commit             abc

length  rule             loss  perplexity  bits per byte
------  -------------  ------  ----------  -------------
   128  all_positions  5.5000    244.6919
 2,048  same_targets   5.2500    190.5663         1.9000
"""


def test_the_whole_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert format_result(RESULT) == EXPECTED
    print_result(RESULT)
    captured = capsys.readouterr()
    assert captured.out == EXPECTED
    assert captured.err == ""
    stream = io.StringIO()
    print_result({"status": "stopped"}, stream)
    assert stream.getvalue() == "status  stopped\n"


def test_small_flops_and_short_times_keep_their_unit() -> None:
    assert format_result({"flops": 900, "data_seconds": 1.5, "finite": float("inf")}) == "flops   900 FLOP\ndata    1.50 s\nfinite  inf\n"


def test_environment_record_is_json_and_holds_no_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "do-not-write-me")
    record = environment_record(device=torch.device("cpu"), n_processes=3)
    text = json.dumps(record)
    assert "do-not-write-me" not in text
    assert os.uname().nodename not in text
    assert record["torch"] == torch.__version__
    assert record["n_processes"] == 3
    assert record["device_type"] == "cpu"
    assert record["packages"]["numpy"]


def test_git_state_of_a_checkout_and_of_an_installed_package(tmp_path: Path) -> None:
    package = tmp_path / "titanarch"
    package.mkdir()
    assert git_state(package) == {}
    (package / "a.py").write_text("a = 1\n")

    def git(*words: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(["git", "-C", str(tmp_path), *identity, *words], capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    assert git_state(package) == {}, "no commit yet"
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert git_state(package) == {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": False}
    (package / "a.py").write_text("a = 2\n")
    assert git_state(package)["uncommitted_changes"] is True
