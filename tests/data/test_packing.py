"""Rows of whole documents and rows with padding, against plain loops."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.data.common import content, loader_of, make_texts, run_steps, write_jsonl
from titanarch.data import packing
from titanarch.data.config import DataConfig
from titanarch.data.fixed import documents
from titanarch.data.phases import Phase
from titanarch.data.tokenizers import build_tokenizer

SEQ_LEN = 24
TEXTS = [*make_texts(70, longest=30), "", "x", "y" * (SEQ_LEN - 1), "z" * SEQ_LEN, "w" * (SEQ_LEN + 1), "v" * 2 * SEQ_LEN]
ROWS = 6


def plain_best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """The pieces of each row, placed one by one: longest first, into the smallest space, of equal ones that which is oldest."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # of each row: what is left, and since when
    for time, piece in enumerate(sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))):
        fitting = [(space, since, row) for row, (space, since) in enumerate(spaces) if space >= sizes[piece]]
        if fitting:
            space, _, row = min(fitting)
        else:
            space, row = capacity, len(rows)
            rows.append([])
            spaces.append((0, 0))
        rows[row].append(piece)
        spaces[row] = (space - sizes[piece], time)
    return rows


def plain_pieces(documents: list[list[int]]) -> list[list[int]]:
    """Each with its last target, where it has one after its T tokens."""
    return [tokens[first : first + SEQ_LEN + 1] for tokens in documents for first in range(0, max(1, len(tokens) - 1), SEQ_LEN) if tokens]


def plain_row(pieces: list[list[int]]) -> bytes:
    """Tokens, labels, positions and documents of a row, as ``content`` gives them."""
    inputs, labels, positions, numbers = [], [], [], []
    for number, piece in enumerate(pieces):
        shown = piece[:SEQ_LEN]
        inputs += shown
        labels += [*piece[1:], -100][: len(shown)]
        positions += range(len(shown))
        numbers += [number] * len(shown)
    n_padding = SEQ_LEN - len(inputs)
    inputs, labels = inputs + [0] * n_padding, labels + [-100] * n_padding
    positions, numbers = positions + list(range(n_padding)), numbers + [len(pieces)] * n_padding
    return b"".join(np.array(values, dtype=np.int64).tobytes() for values in (inputs, labels, positions, numbers))


def plain_part(pieces: list[list[int]], first: int, length: int) -> bytes:
    """Columns ``first`` to ``first + length`` of that row, token by token."""
    tokens, targets, _, numbers = np.frombuffer(plain_row(pieces), dtype=np.int64).reshape(4, SEQ_LEN)
    shown = slice(first, first + length)
    number = numbers[shown] - numbers[first]
    positions = [column - number.tolist().index(document) for column, document in enumerate(number.tolist())]
    return b"".join(np.array(values, dtype=np.int64).tobytes() for values in (tokens[shown], targets[shown], positions, number))


@pytest.fixture
def config(tmp_path: Path, config_of: Callable[..., DataConfig]) -> DataConfig:
    return config_of(source={"kind": "jsonl", "paths": [str(write_jsonl(tmp_path / "a.jsonl", TEXTS))]})


TOKENS = [[*text.encode(), 256] for text in TEXTS]


@pytest.mark.parametrize("capacity", [1, 2, 7, 40])
def test_best_fit_is_that_of_a_plain_loop(capacity: int) -> None:
    draw = np.random.default_rng(capacity)
    for n in (0, 1, 5, 300):
        sizes = draw.integers(1, capacity + 1, n)
        row_P, column_P = packing.best_fit(sizes, capacity)
        expected = plain_best_fit(sizes.tolist(), capacity)
        for row, pieces in enumerate(expected):
            assert sorted(np.flatnonzero(row_P == row).tolist(), key=lambda piece: column_P[piece]) == pieces
            assert column_P[pieces].tolist() == [int(sizes[pieces[:i]].sum()) for i in range(len(pieces))]
        assert len(expected) == (row_P.max() + 1 if n else 0)


@pytest.mark.parametrize("kind", ["best_fit", "padded"])
def test_an_epoch_has_the_rows_of_a_plain_loop_once(kind: packing.Packing, config: DataConfig) -> None:
    config = config.model_copy(update={"packing": kind})
    if kind == "best_fit":
        pieces = plain_pieces(TOKENS)
        rows = plain_best_fit([min(len(piece), SEQ_LEN) for piece in pieces], SEQ_LEN)
        expected = [plain_row([pieces[i] for i in row]) for row in rows]
    else:
        expected = [plain_row([tokens[: SEQ_LEN + 1]]) for tokens in TOKENS]
    n_steps = 2 * len(expected) // ROWS + 1
    seen, _ = run_steps(config, None, steps=n_steps, rows=ROWS, local=ROWS, degree=1, seq_len=SEQ_LEN)
    for epoch in range(2):
        assert Counter(seen[epoch * len(expected) + i] for i in range(len(expected))) == Counter(expected)
    assert loader_of(config, rows=ROWS, local=ROWS, rank=0, degree=1, seq_len=SEQ_LEN).rows.n_windows == len(expected)
    assert [seen[i] for i in range(len(expected))] != [seen[len(expected) + i] for i in range(len(expected))]


@pytest.mark.parametrize("workers", [0, 2])
def test_shorter_rows_are_parts_of_those_of_a_plain_loop(workers: int, config: DataConfig) -> None:
    """The target of a part's last token is the next one of the whole row; positions and documents count from where the part begins."""
    pieces = plain_pieces(TOKENS)
    whole = [[pieces[i] for i in row] for row in plain_best_fit([min(len(piece), SEQ_LEN) for piece in pieces], SEQ_LEN)]
    n_steps = -(-len(whole) // ROWS)
    earlier = [Phase(SEQ_LEN // 3, ROWS, ROWS, 6), Phase(SEQ_LEN // 2, ROWS, ROWS, 8), Phase(SEQ_LEN // 8, 8 * ROWS, ROWS, n_steps)]
    config = config.model_copy(update={"packing": "best_fit", "workers": workers})
    loader = loader_of(config, rows=ROWS, local=ROWS, rank=0, degree=1, seq_len=SEQ_LEN, earlier=earlier)
    used: list[tuple[int, int, int]] = []
    while loader.epoch < 2:
        batch = next(loader)
        assert batch.origin_BI is not None
        for (_, found), (_, epoch, window, part, n_parts) in zip(content(batch), batch.origin_BI.tolist(), strict=True):
            length = SEQ_LEN // n_parts
            assert found == plain_part(whole[window], part * length, length)
            used += [(epoch, window, column) for column in range(part * length, (part + 1) * length)]
    loader.close()
    assert loader.phase.seq_len == SEQ_LEN
    assert sorted(used[: 2 * len(whole) * SEQ_LEN]) == [
        (epoch, window, column) for epoch in range(2) for window in range(len(whole)) for column in range(SEQ_LEN)
    ]


def test_groups_hold_every_target_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With groups of 16 pieces: each piece once, in the rows of its group, none longer than a row."""
    monkeypatch.setattr(packing, "GROUP_PIECES", 16)
    starts = np.concatenate([[0], np.cumsum([len(tokens) for tokens in TOKENS])])
    made = packing.plan("best_fit", starts, seq_len=SEQ_LEN)
    targets = sorted(t for start, size in zip(made.start_P, made.size_P, strict=True) for t in range(start + 1, start + size))
    assert targets == [t for t in range(starts[-1]) if t not in set(starts.tolist())]
    pieces = [
        start for tokens, start in zip(TOKENS, starts, strict=False) for start in range(start, start + max(1, len(tokens) - 1), SEQ_LEN)
    ]
    group_of = {start: i // 16 for i, start in enumerate(pieces)}
    rows = [slice(*made.first_R[r : r + 2]) for r in range(made.n_rows)]
    assert all(len({group_of[start] for start in made.start_P[row].tolist()}) == 1 for row in rows)
    assert all(np.minimum(made.size_P[row], SEQ_LEN).sum() <= SEQ_LEN for row in rows)


@pytest.mark.parametrize("kind", ["concat", "best_fit", "padded"])
def test_counts(kind: packing.Packing, config: DataConfig) -> None:
    """Against the batches of an epoch, and against the documents one by one."""
    config = config.model_copy(update={"packing": kind})
    loader = loader_of(config, rows=1, local=1, rank=0, degree=1, seq_len=SEQ_LEN)
    data = documents(config, "train", build_tokenizer(config.tokenizer))
    made = packing.counts(kind, data.starts, seq_len=SEQ_LEN)
    labels = np.concatenate([next(loader).labels_BT.numpy() for _ in range(made.rows)])
    assert (made.rows, made.places, made.documents) == (loader.rows.n_windows, labels.size, len(TEXTS))
    assert made.targets == (labels != -100).sum()
    begins = np.cumsum([0, *map(len, TOKENS)])[:-1].tolist()
    if kind == "concat":
        whole = [begin // SEQ_LEN == (begin + max(0, len(tokens) - 2)) // SEQ_LEN for begin, tokens in zip(begins, TOKENS, strict=True)]
        assert made.real == made.places
        assert made.unused == sum(map(len, TOKENS)) - made.rows * SEQ_LEN - 1
        in_rows = [begin + max(1, len(tokens) - 1) <= made.places for begin, tokens in zip(begins, TOKENS, strict=True)]
        assert made.cut == sum(not (a and b) for a, b in zip(whole, in_rows, strict=True))
        return
    assert made.cut == sum(len(tokens) > SEQ_LEN + 1 for tokens in TOKENS)
    assert made.unused == (sum(max(0, len(tokens) - SEQ_LEN - 1) for tokens in TOKENS) if kind == "padded" else 0)
    shown = plain_pieces(TOKENS) if kind == "best_fit" else TOKENS
    assert made.real == sum(min(len(piece), SEQ_LEN) for piece in shown)


def test_best_fit_fills_the_rows_of_the_corpus() -> None:
    """Its 225 lengths are drawn anew here: long documents whose remainders fill the rows they share."""
    lengths = np.exp(np.random.default_rng(0).normal(9.2, 1.0, 225)).astype(np.int64)
    made = packing.counts("best_fit", np.concatenate([[0], lengths.cumsum()]), seq_len=512)
    assert made.real / made.places >= 0.995
    assert made.unused == 0


def test_rows_that_hold_several_shards(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of tokens that lie in several files are those of one file."""
    data = documents(config, "train", build_tokenizer(config.tokenizer))
    start_P, size_P = np.array([3, 90, 40, 200]), np.array([100, 1, 20, 55])
    place_P = np.cumsum(size_P) - size_P

    def copied() -> np.ndarray:
        into = np.zeros(size_P.sum(), dtype=data.dtype)
        data.copy_spans(start_P, size_P, into=into, place_P=place_P)
        return into

    whole = copied()
    shard = data._shards[0]
    cuts = [0, 50, 96, 240, len(shard)]
    monkeypatch.setattr(data, "_shards", [shard[a:b] for a, b in pairwise(cuts)])
    monkeypatch.setattr(data, "_shard_ends", cuts[1:])
    np.testing.assert_array_equal(copied(), whole)
    joined = np.array([token for tokens in TOKENS for token in tokens])
    np.testing.assert_array_equal(whole, np.concatenate([joined[a : a + n] for a, n in zip(start_P, size_P, strict=True)]))
