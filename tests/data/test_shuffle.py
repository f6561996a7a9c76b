"""Packed, padded and shuffled rows are the same in any layout, with any workers and after any restart."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.common import loader_of, make_texts, run_steps, write_jsonl
from tests.data.test_packing import plain_row
from titanarch.config.errors import ConfigError
from titanarch.data.config import DataConfig

SEQ_LEN = 24
ROWS = 6
TEXTS = [f"{i} {text}" for i, text in enumerate(make_texts(50, seed=2, longest=12))]
KINDS: dict[str, dict[str, Any]] = {
    "best_fit": {"packing": "best_fit"},
    "padded": {"packing": "padded"},
    "streamed padded": {"mode": "streamed", "packing": "padded"},
    "streamed shuffled": {"mode": "streamed", "shuffle_documents": 7, "streams": 12},
    "streamed best_fit": {"mode": "streamed", "packing": "best_fit"},
    "streamed shuffled best_fit": {"mode": "streamed", "shuffle_documents": 7, "streams": 12, "packing": "best_fit"},
    "streamed shuffled padded": {"mode": "streamed", "shuffle_documents": 16, "packing": "padded"},
}


def config_for(kind: str, tmp_path: Path, config_of: Callable[..., DataConfig], **more: Any) -> DataConfig:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    return config_of(source={"kind": "jsonl", "paths": [str(path)]}, **KINDS[kind], **more)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_and_restarts_change_nothing(kind: str, tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    config = config_for(kind, tmp_path, config_of)
    draw, n_steps = random.Random(4), 26
    expected, _ = run_steps(config, None, steps=n_steps, rows=ROWS, local=ROWS, degree=1, seq_len=SEQ_LEN)
    assert sorted(expected) == list(range(n_steps * ROWS))
    rows: dict[int, bytes] = {}
    state: dict[str, Any] | None = None
    done = 0
    while done < n_steps:
        steps = min(draw.randint(0, 9), n_steps - done)
        degree, local = draw.choice([(1, 6), (1, 2), (2, 3), (2, 1), (3, 2)])
        part, state = run_steps(config, state, steps=steps, rows=ROWS, local=local, degree=degree, seq_len=SEQ_LEN)
        assert not rows.keys() & part.keys()
        rows |= part
        done += steps
    assert rows == expected


@pytest.mark.parametrize("kind", ["best_fit", "streamed shuffled padded", "streamed shuffled best_fit"])
def test_workers_change_nothing(kind: str, tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    config = config_for(kind, tmp_path, config_of)
    expected, _ = run_steps(config, None, steps=9, rows=ROWS, local=ROWS, degree=1, seq_len=SEQ_LEN)
    first, state = run_steps(config, None, steps=4, rows=ROWS, local=3, degree=1, seq_len=SEQ_LEN)
    rest, _ = run_steps(config.model_copy(update={"workers": 2}), state, steps=5, rows=ROWS, local=2, degree=1, seq_len=SEQ_LEN)
    assert first | rest == expected


def test_a_buffer_is_shuffled_anew_each_pass(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    """One stream of padded rows shows the order of documents: blocks of 16 in turn, each with its documents once."""
    config = config_for("streamed shuffled padded", tmp_path, config_of)
    rows, _ = run_steps(config, None, steps=2 * len(TEXTS), rows=1, local=1, degree=1, seq_len=SEQ_LEN)
    numbers = {plain_row([[*text.encode(), 256][: SEQ_LEN + 1]]): i for i, text in enumerate(TEXTS)}
    assert len(numbers) == len(TEXTS)
    order = [numbers[rows[k]] for k in range(2 * len(TEXTS))]
    passes = [order[: len(TEXTS)], order[len(TEXTS) :]]
    for one in passes:
        for block in range(0, len(TEXTS), 16):
            assert sorted(one[block : block + 16]) == list(range(block, min(block + 16, len(TEXTS))))
    places = [[number % 16 for number in one[block : block + 16]] for one in passes for block in (0, 16)]
    assert sum(a == b for i, one in enumerate(places) for other in places[:i] for a, b in zip(one, other, strict=True)) < 20  # 6 expected
    other, _ = run_steps(config, None, steps=len(TEXTS), rows=1, local=1, degree=1, seq_len=SEQ_LEN, seed=4)
    assert [numbers[other[k]] for k in range(len(TEXTS))] != passes[0]


def test_epochs_of_padded_streams(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    config = config_for("streamed padded", tmp_path, config_of, limit_documents=48)
    loader = loader_of(config, rows=ROWS, local=ROWS, rank=0, degree=1, seq_len=SEQ_LEN)
    epochs = []
    for _ in range(20):
        next(loader)
        epochs.append(loader.epoch)
    assert epochs == [0] * 8 + [1] * 8 + [2] * 4  # a step takes one of the 8 documents of each of 6 streams


def test_too_few_documents_for_the_streams(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    config = config_for("streamed shuffled padded", tmp_path, config_of, limit_documents=4)
    with pytest.raises(ConfigError, match=r"\[data\] streams: the train split has 4 documents, fewer than the 6 streams"):
        next(loader_of(config, rows=ROWS, local=ROWS, rank=0, degree=1, seq_len=SEQ_LEN))
