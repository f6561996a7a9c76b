"""``titanarch checkpoint`` on small checkpoints."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.common import checkpointer, one_process
from titanarch.checkpoint.comparing import difference_of
from titanarch.cli.main import main

__all__ = ["one_process"]
pytestmark = pytest.mark.usefixtures("one_process")

Said = Callable[..., tuple[int, str]]


def state(seed: int) -> dict[str, Any]:
    """A model of three dtypes, an optimizer, and plain values."""
    generator = torch.Generator().manual_seed(seed)
    model = {
        "w": torch.randn(300, 5, generator=generator),
        "half": torch.randn(7, generator=generator).to(torch.bfloat16),
        "count": torch.arange(4),
    }
    return {"model": model, "optimizer": {"m": torch.zeros(3)}, "data": {"row": seed}}


def save(location: Path | str, states: dict[int, dict[str, Any]], *, loss: float | None = None) -> None:
    saver = checkpointer("unused", folder=str(location), keep_latest_k=0)
    for step, saved in states.items():
        saver.save(step, saved, config_text="[model]\n", validation_loss=loss, force_sync=True)
    saver.close()


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Exit status and all output of ``titanarch checkpoint`` with some arguments."""

    def of(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        status = main(["checkpoint", *map(str, arguments)])
        output = capsys.readouterr()
        return status, output.out + output.err

    return of


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_ls_and_verify(tmp_path: Path, said: Said) -> None:
    save(tmp_path, {5: state(0)})
    save(tmp_path, {1200: state(1), 1300: state(2), 1400: state(3)}, loss=1.23456)
    damage(tmp_path / "step-00001200/__0_0.distcp")
    (tmp_path / "step-00001300/.metadata").unlink()
    (tmp_path / "step-00001400/COMMITTED.json").unlink()
    n_bytes = sum(path.stat().st_size for path in (tmp_path / "step-00000005").iterdir() if path.name != "COMMITTED.json")
    status, table = said("ls", tmp_path)
    assert status == 0
    cells = [line.split() for line in table.splitlines()]
    assert cells[0] == ["checkpoint", "step", "processes", "bytes", "committed", "validation", "loss", "state"]
    assert cells[1][:4] == ["step-00000005", "5", "1", f"{n_bytes:,}"]
    assert cells[1][5:] == ["-", "sound"]
    assert cells[2][1:3] + cells[2][5:] == ["1,200", "1", "1.2346", "sound"], "sizes tell nothing of a flipped bit"
    assert "damaged: the file .metadata is missing" in table.splitlines()[3]
    assert "not committed: it has no COMMITTED.json" in table.splitlines()[4]

    status, lines = said("verify", tmp_path)
    assert status == 1
    assert [line.rsplit("/", 1)[1] for line in lines.splitlines()] == [
        f"step-00000005: sound: 2 files, {n_bytes:,} bytes",
        "step-00001200: damaged: the file __0_0.distcp is damaged: its SHA-256 is not the committed one",
        "step-00001300: damaged: the file .metadata is missing",
        "step-00001400: not committed: it has no COMMITTED.json",
    ]
    assert said("verify", tmp_path / "step-00000005")[0] == 0
    assert said("verify", tmp_path / "step-00001200/")[0] == 1
    assert said("verify", tmp_path / "step-00001400")[0] == 1
    for damaged in ("step-00001200", "step-00001300"):
        shutil.rmtree(tmp_path / damaged)
    assert said("verify", tmp_path)[0] == 0, "what a kill leaves behind is no damage"
    assert said("verify", tmp_path / "nothing") == (2, f"{tmp_path}/nothing holds no checkpoint; give {PATH_HELP}\n")


PATH_HELP = "a run's folder, a folder or URL of checkpoints, or one checkpoint (step-00000100)"


def test_a_runs_folder_leads_to_its_checkpoints(tmp_path: Path, said: Said) -> None:
    debug = Path(__file__).parents[2] / "train_configs" / "debug.toml"
    (tmp_path / "config.toml").write_text(f'extends = "{debug}"\n[checkpoint]\nfolder = "kept"\n')
    save(tmp_path / "kept", {5: state(0)})
    assert said("ls", tmp_path)[1].splitlines()[1].startswith("step-00000005 ")


def test_urls(tmp_path: Path, said: Said) -> None:
    location = f"memory://{tmp_path}/run"
    save(location, {1: state(0), 2: state(0)})
    assert said("ls", location)[1].count("sound") == 2
    assert said("verify", f"{location}/step-00000002")[0] == 0
    assert said("diff", f"{location}/step-00000001", location) == (0, "4 tensors are identical, 0 differ\n")


def test_diff_names_what_differs_the_largest_first(tmp_path: Path, said: Said) -> None:
    first, second = state(0), state(0)
    second["model"]["w"][3, 1] += 0.5
    second["model"]["w"][4, 1] += 0.25
    second["model"]["count"] = torch.tensor([0, 1, 2, 13])
    second["optimizer"] = {"m": torch.zeros(2), "v": torch.zeros(1)}
    second["data"] = {"row": 7}
    save(tmp_path, {1: first, 2: second})
    status, report = said("diff", tmp_path / "step-00000001", tmp_path)
    assert status == 1
    lines = report.splitlines()
    assert lines[:3] == [
        f"optimizer.v is only in {tmp_path}/step-00000002",
        "optimizer.m has the shapes (3,) and (2,)",
        "the value data.row is 0 and 7",
    ]
    w = float(first["model"]["w"][3, 1]), float(second["model"]["w"][3, 1])
    v = float(first["model"]["w"][4, 1]), float(second["model"]["w"][4, 1])
    relative = max(abs(b - a) / max(abs(a), abs(b)) for a, b in (w, v))
    assert [line.split() for line in lines[4:6]] == [
        ["model.count", "4", "1", "10", f"{10 / 13:.6g}"],
        ["model.w", "1,500", "2", f"{w[1] - w[0]:.6g}", f"{relative:.6g}"],
    ]
    assert lines[6] == "1 tensors are identical, 2 differ"


def test_differences_of_odd_numbers() -> None:
    inf, nan = math.inf, math.nan
    first = torch.tensor([nan, nan, inf, inf, inf, 1.0])
    same = difference_of("x", first, first.clone())
    assert (same.n_differing, same.absolute, same.relative) == (0, 0.0, 0.0)
    other = difference_of("x", first, torch.tensor([nan, 1.0, inf, -inf, 0.0, 2.0]))
    assert (other.n_differing, other.absolute, other.relative) == (4, inf, inf)
    large = difference_of("x", torch.tensor([2**62]), torch.tensor([2**62 + 1]))  # one number in float64
    assert (large.n_differing, large.absolute) == (1, 1.0)
    wide = torch.zeros(2**20 + 5)
    wide[-1] = -2.0
    assert difference_of("x", wide, torch.zeros(2**20 + 5)).absolute == 2.0


def test_average_is_a_checkpoint_to_start_from(tmp_path: Path, said: Said) -> None:
    states = {step: state(step) for step in (1, 2, 3)}
    save(tmp_path / "run", states)
    out = tmp_path / "mean"
    paths = [tmp_path / f"run/step-0000000{step}" for step in states]
    status, report = said("average", *paths, "--out", out)
    assert (status, "the mean of 3 models" in report) == (0, True)
    assert said("verify", out)[0] == 0
    loaded = {"model": {name: torch.zeros_like(tensor) for name, tensor in state(0)["model"].items()}}
    saver = checkpointer(tmp_path / "fresh", initial_load_path=str(out))
    found = saver.load_initial(loaded)
    saver.close()
    assert found is not None
    assert (found.step, found.config) == (3, "[model]\n")
    for name in ("w", "half"):
        tensors = [states[step]["model"][name] for step in states]
        mean = torch.stack([tensor.double() for tensor in tensors]).mean(0)
        assert torch.equal(loaded["model"][name], mean.to(tensors[0].dtype)), name
    assert torch.equal(loaded["model"]["count"], torch.arange(4))
    assert said("average", *paths, "--out", out) == (2, f"{out} exists already; remove it or choose another --out\n")


def test_average_refuses_what_does_not_fit_together(tmp_path: Path, said: Said) -> None:
    wider, counted = state(0), state(0)
    wider["model"] |= {"w": torch.zeros(2, 5), "half": torch.zeros(7), "extra": torch.zeros(1)}
    counted["model"]["count"] = torch.arange(4) + 1
    save(tmp_path, {1: state(0), 2: wider, 3: counted})
    a, b, c = (tmp_path / f"step-0000000{step}" for step in (1, 2, 3))
    status, message = said("average", a, b, "--out", tmp_path / "mean")
    assert status == 2
    assert f"model.extra is only in {b}" in message
    assert f"model.w has shape (300, 5) in {a} and (2, 5) in {b}" in message
    assert f"model.half is torch.bfloat16 in {a} and torch.float32 in {b}" in message
    status, message = said("average", a, c, "--out", tmp_path / "mean")
    assert (status, "model.count is torch.int64, of which there is no mean" in message) == (2, True)
    damage(c / "__0_0.distcp")
    status, message = said("average", a, c, "--out", tmp_path / "mean")
    assert (status, f"{c} is damaged: the file __0_0.distcp" in message) == (2, True)
    assert said("average", a, "--out", tmp_path / "mean") == (2, "a mean wants two or more checkpoints\n")
    assert not (tmp_path / "mean").exists()
