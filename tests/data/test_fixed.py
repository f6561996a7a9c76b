from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.common import content, joined_bytes, make_texts, naive_row, write_jsonl
from titanarch.config.errors import ConfigError
from titanarch.data.config import DataConfig
from titanarch.data.fixed import documents, fixed_batches
from titanarch.data.tokenizers import BytesConfig, BytesTokenizer

TEXTS = make_texts(30)
BYTES = BytesTokenizer(BytesConfig())
SEQ_LEN = 32


@pytest.fixture
def config(tmp_path: Path, config_of: Callable[..., DataConfig]) -> DataConfig:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    return config_of(source={"kind": "jsonl", "paths": [str(path)]}, validation={"kind": "jsonl", "paths": [str(path)]})


def rows_of(config: DataConfig, *, n_rows: int | None, batch_size: int, degree: int, split="validation", seq_len: int = SEQ_LEN):
    """Content of the rows of all ranks by number, fillers left out, and the number of batches of each rank."""
    rows, counts = {}, []
    for rank in range(degree):
        options = {"n_rows": n_rows, "batch_size": batch_size, "dp_rank": rank, "dp_degree": degree}
        batches = fixed_batches(config, split, tokenizer=BYTES, seq_len=seq_len, **options)
        counts.append(len(batches))
        assert len(list(batches)) == len(batches)
        for batch in batches:
            assert batch.tokens_BT.shape == (batch_size, seq_len)
            assert batch.cu_seqlens.shape == (batch_size * seq_len + 1,)
            assert (batch.labels_BT[batch.row_B < 0] == -100).all()
            rows |= {row: whole for row, whole in content(batch) if row >= 0}
    return rows, counts


def test_all_rows_hold_every_target_once(config: DataConfig) -> None:
    tokens, begins = joined_bytes(TEXTS)
    n_whole = (len(tokens) - 1) // SEQ_LEN
    rows, _ = rows_of(config, n_rows=None, batch_size=4, degree=1)
    assert [rows[k] for k in range(n_whole)] == [naive_row(tokens, begins, k * SEQ_LEN, SEQ_LEN) for k in range(n_whole)]
    assert sorted(rows) == list(range(n_whole + 1))
    tail = np.frombuffer(rows[n_whole], dtype=np.int64).reshape(4, SEQ_LEN)
    n_real = len(tokens) - n_whole * SEQ_LEN
    assert tail[0, :n_real].tolist() == tokens[n_whole * SEQ_LEN :].tolist()
    n_targets = sum((np.frombuffer(whole, dtype=np.int64).reshape(4, SEQ_LEN)[1] != -100).sum() for whole in rows.values())
    assert n_targets == len(tokens) - len(TEXTS)  # all but the first token of each document


def test_every_layout_has_the_same_rows_in_lockstep(config: DataConfig) -> None:
    for n_rows in (None, 1, 7):
        expected, _ = rows_of(config, n_rows=n_rows, batch_size=1, degree=1)
        if n_rows is not None:
            assert len(expected) == n_rows
        for batch_size, degree in ((3, 1), (4, 2), (2, 4), (64, 2)):
            rows, counts = rows_of(config, n_rows=n_rows, batch_size=batch_size, degree=degree)
            assert rows == expected
            assert len(set(counts)) == 1


def test_a_subset_is_spread_over_the_split(config: DataConfig) -> None:
    tokens, begins = joined_bytes(TEXTS)
    n_windows = -(-(len(tokens) - 1) // SEQ_LEN)
    rows, _ = rows_of(config, n_rows=5, batch_size=5, degree=1)
    assert [rows[k] for k in range(5)] == [naive_row(tokens, begins, k * n_windows // 5 * SEQ_LEN, SEQ_LEN) for k in range(5)]
    assert len(rows_of(config, n_rows=10**6, batch_size=5, degree=1)[0]) == n_windows


def test_data_shorter_than_a_row(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    config = config_of(source={"kind": "jsonl", "paths": [str(write_jsonl(tmp_path / "a.jsonl", ["abc"]))]})
    (batch,) = fixed_batches(config, "train", tokenizer=BYTES, seq_len=8, n_rows=None, batch_size=1, dp_rank=0, dp_degree=1)
    assert batch.tokens_BT.tolist() == [[97, 98, 99, 256, 0, 0, 0, 0]]
    assert batch.labels_BT.tolist() == [[98, 99, 256, -100, -100, -100, -100, -100]]


def test_training_subset_of_streams(config: DataConfig) -> None:
    streamed = config.model_copy(update={"mode": "streamed"})
    tokens, begins = joined_bytes(TEXTS)
    rows, _ = rows_of(streamed, n_rows=6, batch_size=4, degree=2, split="train")
    assert rows == {k: naive_row(tokens, begins, k * SEQ_LEN, SEQ_LEN) for k in range(6)}
    n_whole = (len(tokens) - 1) // SEQ_LEN
    assert len(rows_of(streamed, n_rows=10**6, batch_size=4, degree=1, split="train")[0]) == n_whole
    with pytest.raises(ValueError, match="give n_rows"):
        rows_of(streamed, n_rows=None, batch_size=4, degree=1, split="train")
    with pytest.raises(ConfigError, match="fewer than the 100000 tokens of a row"):
        rows_of(streamed, n_rows=1, batch_size=1, degree=1, split="train", seq_len=100_000)
    validation, _ = rows_of(streamed, n_rows=None, batch_size=4, degree=1)
    assert validation == rows_of(config, n_rows=None, batch_size=4, degree=1)[0]


def test_documents(config: DataConfig) -> None:
    found = documents(config, "validation", BYTES)
    assert [(document.id, document.tokens.tolist(), document.n_bytes) for document in found] == [
        (f"a.jsonl:{i + 1}", [*text.encode()], len(text.encode())) for i, text in enumerate(TEXTS)
    ]
