"""Groups of a stream's documents that are packed by best fit."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.common import loader_of, make_texts, run_steps, write_jsonl
from tests.data.test_packing import plain_best_fit, plain_pieces, plain_row
from titanarch.config.errors import ConfigError
from titanarch.data import stream_groups
from titanarch.data.config import DataConfig
from titanarch.data.row_loader import RowLoader
from titanarch.data.stream_groups import FIRST_ROWS, MOST_ROWS, Group, first_rows, rows_after
from titanarch.data.tokenizers.bytes import BytesTokenizer

SEQ_LEN = 24
N_STREAMS = 4
TEXTS = ["", *make_texts(150, seed=3, longest=30), "", "x", "y" * (SEQ_LEN - 1), "z" * SEQ_LEN, "w" * (SEQ_LEN + 1), "v" * 9 * SEQ_LEN, ""]


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_groups, "FIRST_ROWS", 3)
    monkeypatch.setattr(stream_groups, "MOST_ROWS", 10)


@pytest.fixture
def config(tmp_path: Path, config_of: Callable[..., DataConfig]) -> DataConfig:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    return config_of(source={"kind": "jsonl", "paths": [str(path)]}, mode="streamed", packing="best_fit")


def loader_from(config: DataConfig) -> RowLoader:
    return loader_of(config, rows=N_STREAMS, local=N_STREAMS, rank=0, degree=1, seq_len=SEQ_LEN)


def plain_groups(stream: int, *, passes: int = 2) -> list[list[bytes]]:
    """The rows of each group of a stream, in no order."""
    groups = []
    n_rows = 3 + 3 * stream // N_STREAMS
    for _ in range(passes):
        left = [[*text.encode(), 256] for text in TEXTS[stream::N_STREAMS]]
        while left:
            group: list[list[int]] = []
            while left and sum(map(len, group)) < n_rows * SEQ_LEN:
                group.append(left.pop(0))
            pieces = plain_pieces(group)
            rows = plain_best_fit([min(len(piece), SEQ_LEN) for piece in pieces], SEQ_LEN)
            groups.append([plain_row([pieces[i] for i in row]) for row in rows])
            n_rows = min(10, 2 * n_rows)
    return groups


@pytest.mark.usefixtures("small_groups")
def test_rows_are_those_of_a_plain_loop(config: DataConfig) -> None:
    groups = [plain_groups(stream) for stream in range(N_STREAMS)]
    n_steps = min(sum(map(len, each)) for each in groups)
    rows, _ = run_steps(config, None, steps=n_steps, rows=N_STREAMS, local=N_STREAMS, degree=1, seq_len=SEQ_LEN)
    in_order = 0
    for stream, expected in enumerate(groups):
        own = [rows[k] for k in range(stream, len(rows), N_STREAMS)]
        for group in expected:
            found, own = own[: len(group)], own[len(group) :]
            assert Counter(found) == Counter(group) if len(found) == len(group) else Counter(found) <= Counter(group)
            in_order += found == group
    assert in_order < sum(map(len, groups)) / 4, "rows are given in an order of their own"


@pytest.mark.usefixtures("small_groups")
def test_a_resume_at_every_step(config: DataConfig) -> None:
    """What is tokenized again are documents of rows to come alone."""
    loader = loader_from(config)
    for _ in range(25):
        state = json.loads(json.dumps(loader.state_dict()))
        other = loader_from(config)
        other.load_state_dict(state)
        batch = next(loader)
        for (name, a), b in zip(vars(batch).items(), vars(next(other)).values(), strict=True):
            assert np.array_equal(a, b), name
        assert other.state_dict() == loader.state_dict()


def test_a_resume_tokenizes_what_is_to_come() -> None:
    """At its last row a group needs the documents of that row and none besides."""
    group = [[*text.encode(), 256] for text in TEXTS if text]
    lengths = tuple(map(len, group))
    first = Group(lengths, seq_len=SEQ_LEN, seed=1, epoch=0, first=0)
    for number, tokens in enumerate(group):
        first.keep(number, np.array(tokens, dtype=np.int32))
    row, rows = np.empty(SEQ_LEN + 1, dtype=np.int32), []
    while not first.is_empty:
        assert first.next_row(row)[-1] <= SEQ_LEN + 1
        rows.append(row.copy())
    made: list[int] = []

    def make(number: int) -> np.ndarray:
        made.append(number)
        return np.array(group[number], dtype=np.int32)

    last = Group(lengths, seq_len=SEQ_LEN, seed=1, epoch=0, first=0, n_given=len(rows) - 1)
    for number in range(len(group)):
        last.keep(number, lambda number=number: make(number))
    ends = last.next_row(row)
    assert np.array_equal(row, rows[-1])
    assert last.is_empty
    assert len(made) == len(ends) < len(group)


def test_rows_are_full_once_groups_are_large(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    """99.5 % real tokens of documents of log-normal lengths, as pages of the web have."""
    draw = np.random.default_rng(0)
    texts = ["x" * int(np.clip(draw.lognormal(np.log(60), 1.2), 1, 5000)) for _ in range(6000)]
    path = write_jsonl(tmp_path / "many.jsonl", texts)
    config = config_of(source={"kind": "jsonl", "paths": [str(path)]}, mode="streamed", packing="best_fit")
    loader = loader_of(config, rows=1, local=1, rank=0, degree=1, seq_len=256)
    small = sum(FIRST_ROWS * 2**i for i in range(5))
    real = []
    for number in range(small + 2 * MOST_ROWS):
        batch = next(loader)
        if number >= small + FIRST_ROWS:
            real.append(float((batch.tokens_BT != 0).double().mean()))
    assert np.mean(real) >= 0.995


@pytest.mark.usefixtures("small_groups")
def test_counts_of_a_pass() -> None:
    lengths = [len(text.encode()) + 1 for text in TEXTS]
    made = stream_groups.group_counts(np.array(lengths), n_streams=N_STREAMS, seq_len=SEQ_LEN)
    assert made.rows == sum(len(group) for stream in range(N_STREAMS) for group in plain_groups(stream, passes=1))
    pieces = plain_pieces([[0] * length for length in lengths])
    assert made.real == sum(min(len(piece), SEQ_LEN) for piece in pieces)
    assert made.targets == sum(len(piece) - 1 for piece in pieces)
    assert (made.places, made.documents, made.unused) == (made.rows * SEQ_LEN, len(TEXTS), 0)


def test_sizes_of_groups() -> None:
    sizes = [first_rows(stream, 8) for stream in range(8)]
    assert sizes == sorted(set(sizes)), "streams begin with groups of different sizes"
    assert sizes[-1] < rows_after(sizes[0]) == 2 * FIRST_ROWS
    assert rows_after(MOST_ROWS - 1) == rows_after(MOST_ROWS) == MOST_ROWS


def test_a_document_that_has_changed(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = loader_from(config)
    next(loader)
    other = loader_from(config)
    other.load_state_dict(loader.state_dict())
    encode = BytesTokenizer.encode
    monkeypatch.setattr(BytesTokenizer, "encode", lambda self, text: encode(self, text + "!"))
    with pytest.raises(ConfigError, match=r"has \d+ tokens and had \d+ when the checkpoint was taken: restore the training data"):
        next(other)
