"""``titanarch eval`` on a run that was trained for two steps."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed import free_port, run_distributed
from tests.evaluate.common import data_of, texts
from titanarch.cli.main import main
from titanarch.config.load import load_config
from titanarch.train.launch import train
from titanarch.train.run_config import RunConfig

CONFIG = """
[job]
dump_folder = "{folder}/run"
[model]
name = "decoder"
n_layers = 1
d_model = 16
n_heads = 2
channel = "mlp"
mixers = {{ attention = {{}} }}
position = {{ absolute = {{ kind = "learned", max_length = 48 }} }}
[data]
cache_dir = "{folder}/cache"
tokenizer = "bytes"
processes = 1
source = {{ kind = "jsonl", paths = ["{folder}/source.jsonl"] }}
validation = {{ kind = "jsonl", paths = ["{folder}/validation.jsonl"] }}
[training]
seq_len = 16
global_batch_size = 2
steps = 2
mixed_precision_param = "float32"
[optimizer]
name = "AdamW"
lr = 1e-3
[checkpoint]
interval = 1
[metrics]
sinks = ["jsonl"]
[validation]
enable = false
[evaluation]
lengths = [16, 32]
max_tokens = 128
batch_tokens = 64
[debug]
seed = 7
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the run and its result."""
    folder = tmp_path_factory.mktemp("eval")
    data_of(folder, texts(5, seed=1, longest=200), texts(4, seed=2, longest=400))
    (folder / "run.toml").write_text(CONFIG.format(folder=folder), encoding="utf-8")
    result, _ = train(load_config(folder / "run.toml", (), RunConfig))
    return folder / "run", result


def evaluated(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text("utf-8"))


def test_repeats_the_evaluation_at_the_end_of_training(trained: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, result = trained
    assert main(["eval", "--run", str(folder)]) == 0
    found = evaluated(folder)
    assert found["step"] == 2
    assert [(row["rule"], row["length"]) for row in found["context_lengths"]] == [
        (rule, length) for rule in ("all_positions", "same_targets") for length in (16, 32)
    ]
    for row, expected in zip(found["context_lengths"], result["evaluation"], strict=True):
        assert row == pytest.approx(expected)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{folder}, step 2\n\ncontext lengths\n\nrule ")
    for row in found["context_lengths"]:
        assert f"{row['loss']:.4f}" in printed
    assert "position scores" in printed


def test_the_command_line_goes_before_the_run(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, result = trained
    arguments = ["--lengths", "48,16", "--max-tokens", "0", "--step", "1", "--no-baselines", "--batch-tokens", "20"]
    assert main(["eval", "--run", str(folder), *arguments]) == 0
    found = evaluated(folder)
    assert found["step"] == 1
    assert {key: found["setting"][key] for key in ("lengths", "max_tokens", "batch_tokens", "baselines")} == {
        "lengths": [48, 16],
        "max_tokens": 0,
        "batch_tokens": 20,
        "baselines": False,
    }
    rows = found["context_lengths"]
    assert [row["length"] for row in rows] == [48, 16, 48, 16]
    assert not any("unigram_loss" in row for row in rows)
    assert rows[1]["targets"] > 128
    assert rows[1]["loss"] != pytest.approx(result["evaluation"][0]["loss"], rel=1e-6)


def evaluated_on_processes(folder: str, ports: list[int], *commands: list[str]) -> list[dict[str, Any]]:
    """What each command measures on the processes of this group, which are given as by torchrun."""
    dist.destroy_process_group()
    found = []
    for port, arguments in zip(ports, commands, strict=True):
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        assert main(["eval", "--run", folder, *arguments]) == 0
        found.append(evaluated(Path(folder)))
    return found


def test_processes_that_share_rows_measure_what_one_does(trained: tuple[Path, dict[str, Any]]) -> None:
    folder = str(trained[0])
    lengths = ["--lengths", "16,31,48"]  # 31 tokens divide by nothing
    context = ["--parallelism.context_parallel_degree", "2", "--parallelism.context_parallel_method=ring"]
    commands = [[*lengths, *context], [*lengths, "--parallelism.tensor_parallel_degree", "2"]]
    assert main(["eval", "--run", folder, *lengths]) == 0
    expected = evaluated(Path(folder))
    for found in run_distributed(evaluated_on_processes, 2, folder, [free_port() for _ in commands], *commands)[0]:
        assert found.keys() == expected.keys()
        for table in ("context_lengths", "loss_by_position"):
            for ours, theirs in zip(found[table], expected[table], strict=True):
                assert ours.keys() == theirs.keys()
                for key, value in theirs.items():
                    close = isinstance(value, float) and math.isclose(value, ours[key], rel_tol=1e-5, abs_tol=1e-6)
                    assert close or value == ours[key], (table, key, value, ours[key])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "64,16"], "[evaluation] lengths: 64: the model's position table has 48 rows; ask for at most that"),
        (["--step", "7"], "no sound checkpoint of step 7"),
        (["--parallelism.context_parallel_degree=2"], "does not divide the 1 processes"),
        (["--parallelism.context_parallel_degre=2"], "did you mean 'context_parallel_degree'?"),
        (["--training.seq_len", "32"], "'--training' is no option of eval, and no key of [parallelism]"),
    ],
)
def test_what_the_run_cannot_give_is_an_error(
    trained: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["eval", "--run", str(trained[0]), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--run", str(tmp_path)]) == 2
    assert "holds no config.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "16,0"], "'0' is not a number from 1"),
        (["--lengths", "16,,32"], "'' is not a number from 1"),
        (["--lengths", "16,16"], "'16,16' names a length twice"),
        (["--max-tokens", "-1"], "'-1' is not a number from 0"),
        (["--batch-tokens", "many"], "'many' is not a number from 1"),
    ],
)
def test_malformed_arguments_exit_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["eval", "--run", "anywhere", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
