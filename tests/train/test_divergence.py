"""The step that one process makes is, tensor by tensor, the one that several make on any layout; what one module changes is found there."""

import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import free_port, run_distributed
from tests.train.faults import POISONED, faulty_forward
from tests.train.runs import environment, run_forks, train, write_config
from titanarch.cli.main import main
from titanarch.models.language_model import CausalLanguageModel
from titanarch.parallel.config import ParallelismConfig
from titanarch.train.divergence import StepDifference, compared
from titanarch.train.processes import Processes
from titanarch.train.recording import Recorder, Recording
from titanarch.train.replay import Layout, replay

STEP = 2
MODEL = ["--model.layers", '["attention", "other"]', "--model.n_heads", "4", "--training.local_batch_size", "2"]
MIXERS = '{{attention = {{dropout = 0.1, n_kv_heads = 1, qk_norm = true}}, other = {{kind = "attention", dropout = {dropout}}}}}'
SHORT = ["--validation.enable", "false", "--evaluation.enable", "false", "--checkpoint.enable", "false", "--training.steps", "2"]


def options(dropout: float) -> list[str]:
    return [*MODEL, "--model.mixers", MIXERS.format(dropout=dropout), *SHORT, "--lr_scheduler.kind", "constant", "--optimizer.eps", "1e-3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """Two steps of one process, of four micro-batches each."""
    train(write_config(folder, "alone", folder / "cache"), *options(0.1))
    return folder / "alone"


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    """Its second block drops more, and two processes share each layer."""
    path = write_config(folder, "other", folder / "cache")
    train(path, *options(0.3), "--parallelism.tensor_parallel_degree", "2", n_processes=2)
    return folder / "other"


def record(run: Path, parallelism: dict[str, Any], faults: dict[int, str]) -> tuple[dict[str, Any], dict[int, float]]:
    """This process's part of the step."""
    if faults:
        CausalLanguageModel.forward = faulty_forward(faults)  # type: ignore[method-assign]
    processes, recorder = Processes(dist.get_rank(), dist.get_world_size(), torch.device("cpu")), Recorder()
    layout = Layout(ParallelismConfig.model_validate(parallelism))
    return recorder.table, replay(run, STEP, processes, layout=layout, recorder=recorder).losses


def recording(run: Path, n_processes: int, faults: dict[int, str] | None = None, **parallelism: Any) -> Recording:
    tables, losses = zip(*run_distributed(record, n_processes, run, parallelism, faults or {}), strict=True)
    return Recording.of(tables, losses[0])


@pytest.fixture(scope="module")
def expected(alone: Path) -> Recording:
    return recording(alone, 1)


def difference(expected: Recording, found: Recording) -> StepDifference:
    return compared(STEP, expected, found, 1e-4)


@pytest.mark.parametrize(
    ("n_processes", "parallelism"),
    [
        (2, {}),
        (2, {"tensor_parallel_degree": 2}),
        (2, {"tensor_parallel_degree": 2, "enable_sequence_parallel": False}),
        (2, {"context_parallel_degree": 2}),
        (4, {"tensor_parallel_degree": 2, "context_parallel_degree": 2}),
    ],
    ids=str,
)
def test_a_step_is_the_same_on_every_layout(alone: Path, expected: Recording, n_processes: int, parallelism: dict[str, Any]) -> None:
    found = recording(alone, n_processes, **parallelism)
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    result = difference(expected, found)
    assert not result.rows_differ
    each = (result.parameters, result.modules, result.gradients, result.parameter_gradients)
    assert [part.differences for part in each] == [()] * 4
    assert [part.n_left_out for part in each] == [0, 1, 7, 0], "the objective's sums, and gradients of the tables of positions"


def test_gradients_alone_may_differ(alone: Path, expected: Recording) -> None:
    """What spoils a weight's gradient is found in the parameters' gradients, and nowhere else."""
    result = difference(expected, recording(alone, 2, {9: "nan"}))
    assert (result.parameters.differences, result.modules.differences, result.gradients.differences) == ((), (), ())
    assert [(each.name, each.share) for each in result.parameter_gradients.differences] == [(f"{POISONED}.weight", math.inf)]


def forked(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
    """What the launcher does, by forks of a server that has imported the package; tests/train/test_replay.py tries the launcher itself."""
    n_processes = next(int(argument.partition("=")[2]) for argument in command if argument.startswith("--nproc-per-node="))
    shared = environment() | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n_processes)}
    arguments = command[command.index("titanarch") + 1 :]
    ends = run_forks([(arguments, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(n_processes)])
    return subprocess.CompletedProcess(command, max(end.returncode for end in ends), "", "".join(end.stderr for end in ends))


def test_runs_on_two_layouts_part_at_the_module_that_differs(
    alone: Path, other: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titanarch.cli.diff.subprocess.run", forked)
    assert main(["diff", str(alone), str(other)]) == 1
    said = capsys.readouterr().out
    assert "the logged losses part at step 1:" in said
    assert "step 1, replayed on 1 process and on 2 processes (tensor_parallel_degree 2): the losses are" in said
    assert "the rows are the same" in said
    assert "no difference in 30 parameters before the step" in said
    assert "11 of 37 modules' outputs differ; the first is layers.1.mixer.wo, by" in said
    assert "31 of 31 gradients of modules' outputs differ; the first, in backward order, is final_norm, by" in said


def test_the_same_run_on_two_layouts_does_not_part(folder: Path, alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(write_config(folder, "same", folder / "cache"), *options(0.1), n_processes=2)
    assert main(["diff", str(alone), str(folder / "same")]) == 0
    assert "no difference above 1e-05 in the losses of 2 steps" in capsys.readouterr().out


def test_layouts_that_cannot_be_are_refused(alone: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, words in (
        (["--processes", "0"], "would be replayed on 0 processes"),
        (["--processes", "9999"], "would be replayed on 9999 processes"),
        (["--parallelism.tensor_parallel_degree", "2"], "which is not given"),
        (["--processes", "1", "--training.seq_len", "8"], "no option of diff"),
    ):
        assert main(["diff", str(alone), str(other), *given]) == 2
        assert words in capsys.readouterr().err
