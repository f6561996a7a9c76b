"""Every row once and the same, whatever the ranks, micro-batches, workers and restarts; indexed and streamed."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.common import content, joined_bytes, loader_of, make_texts, naive_row, run_steps, write_jsonl
from titanarch.config.errors import ConfigError
from titanarch.data.config import DataConfig
from titanarch.data.loader import build_loader
from titanarch.data.row_loader import merge_states
from titanarch.data.streamed_loader import StreamedLoader
from titanarch.data.streams import _Aside
from titanarch.data.tokenizers import build_tokenizer

SEQ_LEN = 16
ROWS = 12  # a global batch
TEXTS = make_texts(90)
LAYOUTS = [(degree, local) for degree in (1, 2, 3, 4, 6, 12) for local in (1, 2, 3, 4, 6, 12) if ROWS % (degree * local) == 0]


@pytest.fixture(params=["indexed", "streamed"])
def config(request: pytest.FixtureRequest, tmp_path: Path, config_of: Callable[..., DataConfig]) -> DataConfig:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    streams = {"streams": 2 * ROWS} if request.param == "streamed" else {}
    return config_of(source={"kind": "jsonl", "paths": [str(path)]}, mode=request.param, **streams)


def without_number(rows: dict[int, bytes]) -> list[bytes]:
    return sorted(rows.values())


def stream_rows(stream: int, n_streams: int) -> Iterator[bytes]:
    """The rows of a stream, by laying many passes of its documents end to end."""
    tokens, begins = joined_bytes(TEXTS[stream::n_streams] * 40)
    for start in range(0, len(tokens) - SEQ_LEN, SEQ_LEN):
        yield naive_row(tokens, begins, start, SEQ_LEN)


def test_rows_are_those_of_a_plain_loop(config: DataConfig) -> None:
    tokens, begins = joined_bytes(TEXTS)
    n_windows = (len(tokens) - 1) // SEQ_LEN
    n_steps = 2 * n_windows // ROWS + 1
    rows, _ = run_steps(config, None, steps=n_steps, rows=ROWS, local=ROWS, degree=1)
    assert sorted(rows) == list(range(n_steps * ROWS))
    if config.mode == "streamed":
        expected = [stream_rows(stream, 2 * ROWS) for stream in range(2 * ROWS)]
        assert all(rows[k] == next(expected[k % (2 * ROWS)]) for k in range(n_steps * ROWS))
        return
    windows = sorted(naive_row(tokens, begins, window * SEQ_LEN, SEQ_LEN) for window in range(n_windows))
    epochs = [[rows[epoch * n_windows + i] for i in range(n_windows)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == windows
    assert sum(one == other for one, other in zip(*epochs, strict=True)) < 12  # another order each epoch; one agrees on average
    assert epochs[0] != windows


def test_every_layout_sees_the_same_rows(config: DataConfig) -> None:
    expected, state = run_steps(config, None, steps=4, rows=ROWS, local=ROWS, degree=1)
    for degree, local in LAYOUTS:
        rows, other = run_steps(config, None, steps=4, rows=ROWS, local=local, degree=degree)
        assert rows == expected
        assert other == state


def test_every_row_once_over_random_restarts(config: DataConfig) -> None:
    draw = random.Random(4)
    n_steps = 60
    expected, _ = run_steps(config, None, steps=n_steps, rows=ROWS, local=ROWS, degree=1)
    for _ in range(3):
        rows: dict[int, bytes] = {}
        state: dict[str, Any] | None = None
        done = 0
        while done < n_steps:
            steps = min(draw.randint(0, 14), n_steps - done)
            degree, local = draw.choice(LAYOUTS)
            part, state = run_steps(config, state, steps=steps, rows=ROWS, local=local, degree=degree)
            assert not rows.keys() & part.keys()
            rows |= part
            done += steps
        assert rows == expected


def test_workers_change_nothing(config: DataConfig) -> None:
    """Two workers with uneven shares of nine streams, then none, then two, each from the state before."""
    config = config.model_copy(update={"streams": 9 if config.mode == "streamed" else 0})
    expected, _ = run_steps(config, None, steps=12, rows=9, local=9, degree=1)
    rows: dict[int, bytes] = {}
    state: dict[str, Any] | None = None
    for workers, local in ((2, 3), (0, 9), (2, 9)):
        section = config.model_copy(update={"workers": workers})
        part, state = run_steps(section, state, steps=4, rows=9, local=local, degree=1)
        rows |= part
    assert rows == expected


def test_state_counts_what_was_handed_out(config: DataConfig) -> None:
    loader = loader_of(config, rows=ROWS, local=4, rank=0, degree=1)
    assert (loader.accumulation_steps, loader.next_row, loader.epoch) == (3, 0, 0)
    next(loader)
    with pytest.raises(RuntimeError, match="inside a step, after 1 of 3 micro-batches"):
        loader.state_dict()
    next(loader)
    next(loader)
    assert loader.next_row == ROWS
    state = loader.state_dict()
    ahead = [dict(content(next(loader))) for _ in range(6)]
    loader.load_state_dict(state)  # back, in the same loader
    assert [dict(content(next(loader))) for _ in range(6)] == ahead


def test_epochs_are_counted(config: DataConfig) -> None:
    tokens, _ = joined_bytes(TEXTS)
    loader = loader_of(config, rows=ROWS, local=ROWS, rank=0, degree=1)
    epochs = []
    for _ in range(2 * len(tokens) // SEQ_LEN // ROWS + 30):
        epochs.append(loader.epoch)
        next(loader)
    if config.mode == "indexed":
        n_windows = loader.rows.n_windows
        assert n_windows == (len(tokens) - 1) // SEQ_LEN
        assert epochs == [step * ROWS // n_windows for step in range(len(epochs))]
    else:
        lengths = [len(joined_bytes(TEXTS[stream :: 2 * ROWS])[0]) for stream in range(2 * ROWS)]
        rows_before = [[step // 2 + (stream < ROWS and step % 2) for stream in range(2 * ROWS)] for step in range(len(epochs))]
        assert epochs == [min(n * SEQ_LEN // length for n, length in zip(row, lengths, strict=True)) for row in rows_before]


def test_start_row_is_the_state_of_that_row(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    config = config_of(source={"kind": "jsonl", "paths": [str(write_jsonl(tmp_path / "a.jsonl", TEXTS))]})
    expected, state = run_steps(config, None, steps=3, rows=ROWS, local=ROWS, degree=1)
    options = {"seq_len": SEQ_LEN, "global_batch_size": ROWS, "local_batch_size": 6, "dp_rank": 0, "dp_degree": 2, "seed": 3}
    loader = build_loader(config, tokenizer=build_tokenizer(config.tokenizer), start_row=2 * ROWS, **options)
    assert dict(content(next(loader))) == {row: expected[row] for row in range(2 * ROWS, 2 * ROWS + 6)}
    with pytest.raises(ValueError, match="does not begin a step"):
        build_loader(config, tokenizer=build_tokenizer(config.tokenizer), start_row=5, **options)
    assert state["phases"] == [[SEQ_LEN, 3 * ROWS]]


def test_seed_orders_indexed_rows(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    config = config_of(source={"kind": "jsonl", "paths": [str(write_jsonl(tmp_path / "a.jsonl", TEXTS))]})
    one, other = (run_steps(config, None, steps=3, rows=ROWS, local=ROWS, degree=1, seed=seed)[0] for seed in (1, 2))
    assert sum(one[k] == other[k] for k in one) < 6


def test_rows_that_do_not_divide(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"\[training\] global_batch_size: 12 rows a step do not divide .* multiple of 10"):
        loader_of(config, rows=ROWS, local=5, rank=0, degree=2)


def test_state_of_other_data_is_refused(config: DataConfig, tmp_path: Path) -> None:
    _, state = run_steps(config, None, steps=1, rows=ROWS, local=ROWS, degree=1)
    with pytest.raises(ConfigError, match="the checkpoint stands after 12 rows of 16 tokens"):
        loader_of(config, rows=ROWS, local=ROWS, rank=0, degree=1, seq_len=8).load_state_dict(state)
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS[1:], "another document"])
    with pytest.raises(ConfigError, match="the training data have changed"):
        loader_of(config, rows=ROWS, local=ROWS, rank=0, degree=1).load_state_dict(state)


def test_states_of_different_steps_are_not_merged(config: DataConfig) -> None:
    first, second = (loader_of(config, rows=ROWS, local=6, rank=rank, degree=2) for rank in (0, 1))
    next(first)
    with pytest.raises(ValueError, match="not taken after the same step"):
        merge_states([first.state_dict(), second.state_dict()])


def test_too_few_tokens(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    config = config_of(source={"kind": "jsonl", "paths": [str(write_jsonl(tmp_path / "a.jsonl", ["short"]))]})
    with pytest.raises(ConfigError, match=r"\[training\] seq_len: the training data have 6 tokens, too few for one row of 16"):
        loader_of(config, rows=1, local=1, rank=0, degree=1)


def streamed(config_of: Callable[..., DataConfig], path: Path, **options: Any) -> DataConfig:
    return config_of(source={"kind": "jsonl", "paths": [str(path)]}, mode="streamed", **options)


def test_wrong_numbers_of_streams(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:10])
    with pytest.raises(ConfigError, match=r"\[data\] streams: 6 streams are no multiple of the 4 rows"):
        loader_of(streamed(config_of, path, streams=6), rows=4, local=4, rank=0, degree=1)
    with pytest.raises(ConfigError, match=r"\[data\] workers: 3 workers are more than the 2 streams of a rank"):
        loader_of(streamed(config_of, path, workers=3), rows=4, local=2, rank=0, degree=2)
    loader = loader_of(streamed(config_of, path), rows=12, local=12, rank=0, degree=1)
    with pytest.raises(ConfigError, match=r"\[data\] streams: the train split has 10 documents, fewer than the 12 streams"):
        next(loader)
    four = loader_of(streamed(config_of, path), rows=4, local=4, rank=0, degree=1)
    next(four)
    with pytest.raises(ConfigError, match="the checkpoint has 4 streams, the run 8"):
        loader_of(streamed(config_of, path, streams=8), rows=4, local=4, rank=0, degree=1).load_state_dict(four.state_dict())
    with pytest.raises(ValueError, match=r"lacks streams \[2, 3\]"):
        half = loader_of(streamed(config_of, path), rows=4, local=2, rank=0, degree=2)
        next(half)
        four.load_state_dict(half.state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_malformed_document_in_a_stream(workers: int, tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:20])
    path.write_bytes(path.read_bytes() + b'{"text": 7}\n')
    loader = loader_of(streamed(config_of, path, workers=workers), rows=4, local=4, rank=0, degree=1)
    with pytest.raises(ConfigError, match=r"a.jsonl:21: 'text' must be a string, not 7$"):
        for _ in range(100):
            next(loader)
    loader.close()


def test_texts_put_aside_go_to_a_file(tmp_path: Path, config_of: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """One stream has long documents, so the texts of the others pile up; memory for them is 100 bytes."""
    texts = [text * (50 if i % 4 == 1 else 1) for i, text in enumerate(make_texts(200))]
    config = streamed(config_of, write_jsonl(tmp_path / "a.jsonl", texts))
    expected, _ = run_steps(config, None, steps=40, rows=4, local=4, degree=1)
    monkeypatch.setattr("titanarch.data.streams.ASIDE_BYTES", 100)
    loader = loader_of(config, rows=4, local=4, rank=0, degree=1)
    assert isinstance(loader, StreamedLoader)
    rows = {}
    most_in_file = 0
    for _ in range(40):
        rows |= dict(content(next(loader)))
        most_in_file = max(most_in_file, loader._rows._aside._in_file)
    assert rows == expected
    assert most_in_file > 0


def test_limit_of_documents(config: DataConfig) -> None:
    limited = config.model_copy(update={"limit_documents": 30})
    rows, _ = run_steps(limited, None, steps=200, rows=ROWS, local=ROWS, degree=1)
    tokens, _ = joined_bytes(TEXTS[:30])
    seen = {int(token) for whole in rows.values() for token in np.frombuffer(whole[: SEQ_LEN * 8], dtype=np.int64)}
    assert seen <= set(tokens.tolist())
    if config.mode == "indexed":
        assert len(set(rows.values())) <= (len(tokens) - 1) // SEQ_LEN


def test_no_room_for_texts_put_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanarch.data.streams.ASIDE_BYTES", 0)
    monkeypatch.setattr("os.pwrite", lambda file, content, place: len(content) - 1)
    with pytest.raises(OSError, match="No space left on device, for texts of streams that are put aside"):
        _Aside().put("a text")
