"""Whole runs under tensor and context parallelism, started as the launcher starts them: the losses and the evaluation of one process."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.runs import losses, train, write_config

# An attention of another module, whose two heads HEADS divides on two processes, but not once tensor parallelism has.
MIXER = [
    *("--experimental.custom_import", "tests.parallel.heads_first", "--model.layers", '["heads_first"]'),
    *("--model.mixers.heads_first.dropout", "0.1"),
]
TP2, CP2 = ["--parallelism.tensor_parallel_degree", "2"], ["--parallelism.context_parallel_degree", "2"]
SHORT = ["--training.steps", "6", "--validation.interval", "3", "--evaluation.lengths", "[15, 32]"]
SHORT = [*SHORT, "--checkpoint.enable", "false", "--metrics.sinks", '["progress", "jsonl"]', *MIXER]
LAYOUTS: dict[str, tuple[int, list[str]]] = {"tp2": (2, TP2), "cp2": (2, CP2), "tp2_cp2": (4, [*TP2, *CP2])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def one_process(folder: Path) -> Path:
    train(write_config(folder, "one", folder / "cache"), *SHORT)
    return folder / "one"


def result(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((path / "result.json").read_text())
    return loaded


def assert_same(found: Any, expected: Any, where: str) -> None:
    """Numbers within 1e-5, all else equal."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_a_divided_run_is_the_run_of_one_process(folder: Path, one_process: Path, name: str) -> None:
    n_processes, overrides = LAYOUTS[name]
    done = train(write_config(folder, name, folder / "cache"), *SHORT, *overrides, n_processes=n_processes)
    note = "HeadsFirst: context parallelism by gather, as heads: its 1 heads a process are no multiple of 2"
    assert (note in done.stderr) is (name == "tp2_cp2"), "what auto decides is logged"
    expected, found = losses(one_process), losses(folder / name)
    assert sorted(expected) == list(range(1, 7))
    assert found == pytest.approx(expected, rel=1e-5)
    ours, theirs = result(folder / name), result(one_process)
    assert theirs["evaluation"], "something was evaluated"
    for key in ("losses", "evaluation", "evaluation_tables", "step", "tokens", "parameters", "training_flops"):
        assert_same(ours[key], theirs[key], key)
