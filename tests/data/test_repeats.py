"""Epochs: known beforehand where they can be, and more than four refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.common import loader_of, make_texts, write_jsonl
from titanarch.config.errors import ConfigError
from titanarch.data.config import DataConfig
from titanarch.data.mixture import MixtureOrder, Part
from titanarch.data.repeats import check_repeats

ROWS = 4


@pytest.fixture
def source(tmp_path: Path) -> dict[str, Any]:
    return {"kind": "jsonl", "paths": [str(write_jsonl(tmp_path / "a.jsonl", make_texts(20)))]}


def test_more_than_four_epochs_want_leave(config_of: Callable[..., DataConfig], source: dict[str, Any]) -> None:
    loader = loader_of(config_of(source=source), rows=ROWS, local=ROWS, rank=0, degree=1)
    per_epoch = loader.rows.n_windows
    check_repeats(loader.passes(4 * per_epoch), allowed=False)
    ((name, epochs, tokens),) = loader.passes(6 * per_epoch)
    assert (name, epochs) == ("", 6.0)
    assert tokens == sum(len(text.encode()) + 1 for text in make_texts(20))
    check_repeats(loader.passes(6 * per_epoch), allowed=True)
    with pytest.raises(ConfigError, match=rf"6\.00 epochs \({tokens:,} tokens\), more than 4: .* set data\.allow_repeat = true"):
        check_repeats(loader.passes(6 * per_epoch), allowed=False)


@pytest.mark.parametrize("packing", ["concat", "padded"])
def test_streams_are_refused_when_the_fifth_epoch_begins(
    config_of: Callable[..., DataConfig], source: dict[str, Any], packing: str
) -> None:
    def steps_of(*, allow: bool) -> int:
        config = config_of(source=source, mode="streamed", packing=packing, allow_repeat=allow)
        loader = loader_of(config, rows=ROWS, local=ROWS, rank=0, degree=1)
        assert loader.passes(100) == []
        for step in range(400):
            if loader.epoch > 4:
                return step
            next(loader)
        raise AssertionError("the fifth epoch did not end")

    with pytest.raises(ConfigError, match=r"epoch 5 of the source begins here, .* set data\.allow_repeat = true"):
        steps_of(allow=False)
    assert steps_of(allow=True) > 4


@pytest.mark.parametrize("dropped", [(), (1,), (0, 1), (0, 1, 2)])
def test_rows_due_to_sources_are_those_that_they_get(dropped: tuple[int, ...]) -> None:
    knots = [((0, 1.0), (400, 3.0)), ((0, 2.0), (100, 0.5), (600, 0.5)), ((0, 0.2),)]
    parts = [Part(f"s{i}", each, (150, 60, 40)[i], i in dropped) for i, each in enumerate(knots)]
    rows = MixtureOrder(parts).take(800)
    for end in (1, 37, 100, 250, 399, 800):
        taken = [(rows.source_N[:end] == i).sum() for i in range(3)]
        assert np.abs(np.array(MixtureOrder(parts).due(end)) - taken).max() <= 1 + len(dropped)


def test_epochs_of_a_mixture_are_those_of_its_sources(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    def mixed(at_end: str) -> DataConfig:
        paths = [write_jsonl(tmp_path / f"{name}.jsonl", make_texts(n, seed=n)) for name, n in (("a", 30), ("b", 8))]
        sources = [{"source": {"kind": "jsonl", "paths": [str(path)]}, "weight": 1.0, "name": path.stem} for path in paths]
        sources[1]["at_end"] = at_end
        return config_of(source={"kind": "mixture", "sources": sources})

    repeating = loader_of(mixed("repeat"), rows=ROWS, local=ROWS, rank=0, degree=1)
    large, small = repeating.passes(1000)
    assert large.epochs * large.tokens == pytest.approx(small.epochs * small.tokens, rel=0.05)  # half of the rows each
    assert large.epochs * large.tokens == pytest.approx(500 * 16, rel=0.05)
    with pytest.raises(ConfigError, match=r"epochs of b \("):
        check_repeats(repeating.passes(1000), allowed=False)
    stopping = loader_of(mixed("stop"), rows=ROWS, local=ROWS, rank=0, degree=1)
    assert stopping.passes(1000)[1].epochs == pytest.approx(1.0, abs=0.2)  # the run ends with it
    check_repeats(stopping.passes(1000), allowed=False)
