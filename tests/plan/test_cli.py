"""``titanarch plan``: its refusals, its report, its suggestions, and the plans that are kept beside the long-context files."""

import re
from pathlib import Path

import pytest
import torch

from tests.plan.conftest import SMALL
from titanarch.cli.main import main
from titanarch.config.errors import ConfigError
from titanarch.config.load import load_config
from titanarch.contract.model import MODELS
from titanarch.parallel.mesh import Degrees, resolve_degrees
from titanarch.plan.devices import DEVICES, device_named
from titanarch.plan.fit import vocab_size_of
from titanarch.plan.formulas import formula_bytes
from titanarch.plan.plan import resolved_for
from titanarch.plan.predict import link_bandwidth, step_time
from titanarch.plan.trace import Traffic, fake_processes, traceable
from titanarch.train.check import check_run
from titanarch.train.resolve import local_batch_size
from titanarch.train.run_config import RunConfig
from titanarch.train.setup import lay_out

LONG = Path(__file__).resolve().parents[2] / "train_configs" / "long_context"
PLANS = sorted(path.name.removesuffix(".plan.txt") for path in LONG.glob("*.plan.txt"))


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


def test_every_conflict_is_told_as_before_launch(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--parallelism.tensor_parallel_degree=3", "--training.seq_len=100", "--training.local_batch_size=5"]
    assert main(["plan", "--config", small, "--world-size", "6", *wrong]) == 2
    told = capsys.readouterr().err
    loaded = load_config(small, wrong, RunConfig)
    with pytest.raises(ConfigError) as before_launch:
        check_run(loaded.config, world_size=6, device_type="cuda")
    assert told.strip() == str(loaded.located(before_launch.value))
    assert len(before_launch.value.problems) >= 3


def test_an_unknown_device_is_refused(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", small, "--world-size", "1", "--device", "h2000"]) == 2
    assert "did you mean 'h200'?" in capsys.readouterr().err


def test_a_report_has_every_part(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", small, "--world-size", "16", "--device", "h100", "--parallelism.context_parallel_degree=2"]) == 0
    text = capsys.readouterr().out
    for part in ("it can be launched", "dp_shard 8, cp 2", "activations", "cp: ", "closed formula", "FLOP a token", "tokens/s"):
        assert part in text
    assert text.count("predicted") >= 4
    total = sum(map(float, re.findall(r"^  [a-z ]+ +([\d.]+) GiB$", text, re.MULTILINE)))
    peak = re.search(r"^  peak +([\d.]+) GiB$", text, re.MULTILINE)
    assert peak is not None
    assert total == pytest.approx(2 * float(peak[1]), abs=0.01)


def test_suggestions_fit_are_ordered_and_can_be_pasted(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", small, "--world-size", "8", "--suggest"]) == 0
    text = capsys.readouterr().out
    assert "analytic" in text
    seconds = [float(line.split()[0]) for line in text.splitlines() if re.match(r"^ +\d+\.\d+ +\d+\.\d+ +\d+ ", line)]
    assert len(seconds) > 3
    assert seconds == sorted(seconds)
    pasted = tmp_path / "pasted.toml"
    pasted.write_text(f'extends = "{small}"\n{text.split("(analytic)")[1].split("# 2:")[0]}')
    check_run(load_config(pasted, [], RunConfig).config, world_size=8, device_type="cuda")


def test_links_are_slow_between_nodes_and_time_adds_up() -> None:
    h200, degrees = device_named("h200"), Degrees(2, 4, 2, 4)
    assert link_bandwidth("tp", degrees, h200) == link_bandwidth("cp", degrees, h200) == 450e9 * 0.75
    assert link_bandwidth("dp_shard_cp", degrees, h200) == 50e9 * 0.75
    time = step_time(
        training_flops=989.4e12,
        recomputed_share=1.0,
        traffic=[Traffic("tp", "all_gather", 450e9 * 0.75, 1), Traffic("dp_shard_cp", "all_gather", 50e9 * 0.75 * 5, 1)],
        state_bytes=2.4e12,
        degrees=degrees,
        device=h200,
        dtype=torch.bfloat16,
    )
    assert time.compute == pytest.approx(2 * 4 / 3)
    assert time.exposed == pytest.approx(1 + 5 - 2 * 4 / 3)  # what is longer than the computation is waited for
    assert time.update == pytest.approx(1.0)
    assert time.total == time.compute + time.exposed + time.update


@pytest.mark.parametrize("name", PLANS)
def test_kept_plans_are_of_their_files(name: str) -> None:
    """All but what only a trace tells: that takes a minute a file, and the command that made it stands in the file."""
    text = (LONG / f"{name}.plan.txt").read_text()
    header = (LONG / f"{name}.toml").read_text()
    command = re.search(r"^# Plan: titanarch plan --config (\S+) --world-size (\d+) --device (\w+)$", header, re.MULTILINE)
    assert command is not None
    world_size, device = int(command[2]), DEVICES[command[3]]
    assert text.startswith(f"plan of {command[1]} on {world_size} x {command[3]}: ")
    config = traceable(resolved_for(load_config(LONG / f"{name}.toml", [], RunConfig).config, device))
    vocab_size, degrees = vocab_size_of(config), resolve_degrees(config.parallelism, world_size)
    cost = MODELS.of(config.model).cost(config.model, vocab_size, config.training.seq_len)
    assert f"parameters: {cost.parameters:,};" in text
    rows = local_batch_size(config, degrees.data_parallel)
    n_micro_batches = config.training.global_batch_size // (rows * degrees.data_parallel)
    with fake_processes(world_size):
        built = lay_out(config, vocab_size, world_size=world_size, device_type="cpu")
        formulas = formula_bytes(config, built, rows=rows, n_micro_batches=n_micro_batches)
    assert len(formulas) == 2
    for axis, n_bytes in formulas.items():
        assert n_bytes is not None
        assert f"{axis}: {n_bytes / 1e9:.4f} GB, closed formula {n_bytes / 1e9:.4f} GB (+0.00 %)" in text
    assert "fits into" in text


def test_there_is_a_plan_of_each_long_context_file() -> None:
    files = {path.stem for path in LONG.glob("*.toml")}
    assert {f"{name}_cpu" for name in PLANS} | set(PLANS) == files
    assert len(PLANS) == 3
