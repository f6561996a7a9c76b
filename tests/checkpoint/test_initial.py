"""Starting from the weights of another run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.common import assert_bitwise, build, checkpointer, one_process, state_of, tensors, train
from titanarch.checkpoint.marker import MARKER
from titanarch.config.errors import ConfigError

__all__ = ["one_process"]
pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, one_process: None) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of a run with the checkpoints 1 and 2, and the tensors of the second."""
    folder = tmp_path_factory.mktemp("saved")
    net, optimizers = build(0)
    saver = checkpointer(folder)
    for step in (1, 2):
        train(net, optimizers, start=step - 1, steps=1)
        saver.save(step, {**state_of(net, optimizers), "data": {"row": 8 * step}}, config_text="")
    saver.close()
    return folder / "checkpoints", tensors(net, optimizers)


def start(
    tmp_path: Path, path: Path | str, *, width: int = 16, **options: object
) -> tuple[dict[str, torch.Tensor], Any, dict[str, torch.Tensor]]:
    """Tensors before, what load_initial returned, tensors and data state after."""
    net, optimizers = build(1, width=width)
    train(net, optimizers, start=0, steps=1)
    before = tensors(net, optimizers)
    data: dict[str, Any] = {"row": 0}
    saver = checkpointer(tmp_path, initial_load_path=str(path), **options)
    loaded = saver.load_initial({**state_of(net, optimizers), "data": data})
    saver.close()
    return before, (loaded, data), tensors(net, optimizers)


def part(found: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in found.items() if name.startswith(prefix)}


@pytest.mark.parametrize("inside", ["", "step-00000002"])
def test_the_model_alone_is_taken(tmp_path: Path, saved: tuple[Path, dict[str, torch.Tensor]], inside: str) -> None:
    before, (loaded, data), after = start(tmp_path, saved[0] / inside)
    assert loaded.step == 2
    assert_bitwise(part(after, "model."), part(saved[1], "model."))
    assert_bitwise(part(after, "optimizer."), part(before, "optimizer."))
    assert data == {"row": 0}


def test_everything_is_taken_on_demand(tmp_path: Path, saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    _, (_, data), after = start(tmp_path, saved[0], initial_load_model_only=False)
    assert_bitwise(after, saved[1])
    assert data == {"row": 16}
    _, (_, data), after = start(tmp_path, saved[0], initial_load_model_only=False, exclude_from_loading=["data"])
    assert_bitwise(after, saved[1])
    assert data == {"row": 0}


def test_no_path_loads_nothing(tmp_path: Path) -> None:
    before, (loaded, _), after = start(tmp_path, "")
    assert loaded is None
    assert_bitwise(before, after)


def test_excluded_names_keep_their_fresh_values(tmp_path: Path, saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    before, _, after = start(tmp_path, saved[0], exclude_from_loading=["model.head", "model.*.bias"])
    kept = {"model.head.weight", "model.head.bias", "model.first.bias", "model.second.bias", "model.norm.bias"}
    for name, tensor in part(after, "model.").items():
        assert torch.equal(tensor, before[name] if name in kept else saved[1][name]), name


def test_other_shapes_are_listed_unless_excluded(tmp_path: Path, saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with pytest.raises(ConfigError) as caught:
        start(tmp_path, saved[0], width=24)
    text = str(caught.value)
    assert text.startswith("[checkpoint] initial_load_path: ")
    for name, here, there in (("first.weight", (24, 8), (16, 8)), ("head.weight", (4, 24), (4, 16)), ("norm.bias", (24,), (16,))):
        assert f"model.{name} has shape {here} here and {there} in the checkpoint" in text
    assert "model.head.bias" not in text
    assert "exclude_from_loading" in text

    patterns = ["model.first", "model.norm", "model.second", "model.head.weight"]
    before, _, after = start(tmp_path, saved[0], width=24, exclude_from_loading=patterns)
    assert torch.equal(after["model.head.bias"], saved[1]["model.head.bias"])
    assert torch.equal(after["model.first.weight"], before["model.first.weight"])


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path, saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with pytest.raises(
        ConfigError, match=r"\[checkpoint\] exclude_from_loading: 'model.heat.weight' matches no name; did you mean 'model.head.weight'"
    ):
        start(tmp_path, saved[0], exclude_from_loading=["model.heat.weight"])


def test_a_path_without_a_sound_checkpoint_is_refused(tmp_path: Path, saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with pytest.raises(ConfigError, match="holds no committed checkpoint"):
        start(tmp_path, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is no committed checkpoint"):
        start(tmp_path, saved[0] / "step-00000009")
    copy = tmp_path / "step-00000002"
    copy.mkdir()
    for name in (MARKER, ".metadata"):
        (copy / name).write_bytes((saved[0] / "step-00000002" / name).read_bytes())
    with pytest.raises(ConfigError, match=r"is damaged: the file __0_0.distcp is missing"):
        start(tmp_path, copy)
