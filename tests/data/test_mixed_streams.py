"""Mixtures of streamed sources: shares in every round and stream, ends of sources, and the same rows in any layout."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.common import content, joined_bytes, loader_of, make_texts, naive_row, run_steps
from titanarch.cli.main import main
from titanarch.config.errors import ConfigError
from titanarch.data.config import DataConfig
from titanarch.data.fixed import fixed_batches
from titanarch.data.mixed_streams import source_of
from titanarch.data.phases import Phase
from titanarch.data.tokenizers import build_tokenizer

SEQ_LEN = 16
ROWS = 6
TEXTS = {"a": make_texts(60, seed=1), "b": make_texts(24, seed=2), "c": make_texts(40, seed=3, longest=9)}


@pytest.fixture
def mixture_of(mixture_of: Callable[..., DataConfig]) -> Callable[..., DataConfig]:
    """The same, streamed."""
    return partial(mixture_of, mode="streamed")


def stream_rows(name: str, stream: int, n_streams: int, *, passes: int = 40) -> Iterator[bytes]:
    """The rows of a stream of a source, by laying passes of its documents end to end."""
    tokens, begins = joined_bytes(TEXTS[name][stream::n_streams] * passes)
    for start in range(0, len(tokens) - SEQ_LEN, SEQ_LEN):
        yield naive_row(tokens, begins, start, SEQ_LEN)


@pytest.mark.parametrize("n_streams", [1, 2, 7, 8, 34, 256])
@pytest.mark.parametrize("weights", [(1.0,), (0.5, 0.5), (0.7, 0.3), (2.0, 1.0, 1.0), (5.0, 0.0, 1.0, 0.1, 3.3, 0.001)])
def test_shares_of_every_round_and_of_every_stream(n_streams: int, weights: tuple[float, ...]) -> None:
    n_rounds, share_S = 2000, np.array(weights) / sum(weights)
    source_NR = np.array([source_of(row, n_streams, weights) for row in range(n_rounds * n_streams)]).reshape(n_rounds, n_streams)
    taken_SNR = source_NR == np.arange(len(weights))[:, None, None]
    assert np.abs(taken_SNR.sum(2) - share_S[:, None] * n_streams).max() <= 1 + 1e-9
    due_SN1 = share_S[:, None, None] * np.arange(1, n_rounds + 1)[:, None]
    assert np.abs(taken_SNR.cumsum(1) - due_SN1).max() < 4


def test_each_source_gives_the_rows_of_its_own_streams(mixture_of: Callable[..., DataConfig]) -> None:
    """In turn, to rows that frac(r / R + n φ) gives them; a is half of the rows at first and a tenth from row 60 on."""
    config = mixture_of({"a": {"schedule": [[0, 1.0], [60, 0.1]]}, "b": {"schedule": [[0, 1.0], [60, 0.9]]}}, streams=12)
    n_rows = 40 * ROWS
    rows, state = run_steps(config, None, steps=40, rows=ROWS, local=ROWS, degree=1)
    streams = {(name, stream): stream_rows(name, stream, 12) for name in "ab" for stream in range(12)}
    taken: Counter[str] = Counter()
    for k in range(n_rows):
        n, stream = divmod(k, 12)
        weights = [1 + (0.1 - 1) * min(1, k / 60), 1 + (0.9 - 1) * min(1, k / 60)]
        share = weights[0] / sum(weights)
        name = "a" if (stream / 12 + n * (math.sqrt(5) - 1) / 2) % 1 < share else "b"
        assert rows[k] == next(streams[name, stream]), f"row {k}"
        taken[name] += 1
    assert taken["b"] > 3 * taken["a"] > 60
    assert [len(at) for at in state["cursors"].values()] == [2] * 12


@pytest.mark.parametrize(("shuffle", "packing"), [(0, "concat"), (5, "concat"), (5, "best_fit")])
def test_layouts_restarts_and_workers_change_nothing(shuffle: int, packing: str, mixture_of: Callable[..., DataConfig]) -> None:
    """While one source is dropped and another begins again."""
    parts = {"a": {"schedule": [[0, 0.1], [90, 0.6]]}, "b": {"weight": 2.0}, "c": {"weight": 1.0, "at_end": "drop"}}
    config = mixture_of(parts, streams=2 * ROWS, shuffle_documents=shuffle, packing=packing)
    expected, end = run_steps(config, None, steps=80, rows=ROWS, local=ROWS, degree=1)
    assert all(at[2]["epoch"] == 1 for at in end["cursors"].values()), "c has ended everywhere"
    assert max(at[1]["epoch"] for at in end["cursors"].values()) >= 1
    rows: dict[int, bytes] = {}
    state: dict[str, Any] | None = None
    for steps, degree, local, workers in ((7, 2, 3, 0), (9, 1, 2, 2), (0, 2, 1, 0), (13, 3, 2, 0), (20, 1, 6, 2), (31, 6, 1, 0)):
        section = config.model_copy(update={"workers": workers})
        part, state = run_steps(section, state, steps=steps, rows=ROWS, local=local, degree=degree)
        assert not rows.keys() & part.keys()
        rows |= part
    assert rows == expected
    assert state == end


def test_a_dropped_source_is_used_once(mixture_of: Callable[..., DataConfig]) -> None:
    """Of each of its streams every row of the first pass, whose last target is in it; then the others have all rows."""
    config = mixture_of({"a": {"weight": 1.0}, "c": {"weight": 1.0, "at_end": "drop"}})
    rows, _ = run_steps(config, None, steps=60, rows=ROWS, local=ROWS, degree=1)
    once = {stream: list(stream_rows("c", stream, ROWS, passes=1)) for stream in range(ROWS)}
    others = {stream: list(stream_rows("a", stream, ROWS)) for stream in range(ROWS)}
    for stream in range(ROWS):
        own = [rows[k] for k in range(stream, 60 * ROWS, ROWS)]
        assert [row for row in own if row in once[stream]] == once[stream]
        assert [row for row in own if row not in once[stream]] == others[stream][: 60 - len(once[stream])]


def test_what_no_run_goes_past(mixture_of: Callable[..., DataConfig]) -> None:
    def run(parts: dict[str, Any], **table: Any) -> None:
        run_steps(mixture_of(parts, **table), None, steps=400, rows=ROWS, local=ROWS, degree=1)

    with pytest.raises(ConfigError, match=r"\[data.source\] sources: the source c has ended: row \d+ of the run would take tokens of"):
        run({"a": {"weight": 1.0}, "c": {"weight": 1.0, "at_end": "stop"}})
    with pytest.raises(ConfigError, match=r"the source [ac] has ended: row \d+ of the run would take tokens of another pass over it$"):
        run({"a": {"weight": 1.0, "at_end": "drop"}, "c": {"weight": 1.0, "at_end": "drop"}})
    with pytest.raises(ConfigError, match=r"the source c ended, and no other has a weight at row \d+"):
        run({"a": {"schedule": [[0, 1.0], [9, 0.0]]}, "c": {"weight": 1.0, "at_end": "drop"}})
    with pytest.raises(ConfigError, match=r"epoch 5 of the source b begins here, .* set data\.allow_repeat = true"):
        run({"a": {"weight": 1.0}, "b": {"weight": 30.0}}, allow_repeat=False)


def test_epochs_are_counted_for_each_source(mixture_of: Callable[..., DataConfig]) -> None:
    loader = loader_of(mixture_of({"a": {"weight": 1.0}, "c": {"weight": 4.0}}), rows=ROWS, local=ROWS, rank=0, degree=1)
    rows = {name: [len(list(stream_rows(name, stream, ROWS, passes=1))) for stream in range(ROWS)] for name in "ac"}
    for _ in range(60):
        next(loader)
    epochs = loader.source_epochs
    assert epochs["c"] == pytest.approx(60 * 0.8 / max(rows["c"]), abs=1.5)
    assert epochs["a"] == 0
    assert epochs["c"] >= 2
    assert loader.epoch == 0


def test_phases_go_on_in_the_same_streams(mixture_of: Callable[..., DataConfig]) -> None:
    config = mixture_of({"a": {"weight": 1.0}, "b": {"weight": 2.0}}, streams=12)
    options = {"rows": 12, "degree": 1, "seq_len": SEQ_LEN, "earlier": [Phase(8, 6, 3, 3)]}
    expected, end = run_steps(config, None, steps=8, local=12, **options)
    for steps in (2, 3, 5):
        begun, state = run_steps(config, None, steps=steps, local=6, **options)
        rest, last = run_steps(config, state, steps=8 - steps, local=4, **options)
        assert begun | rest == expected
        assert last == end


def test_other_data_and_wrong_sources(mixture_of: Callable[..., DataConfig], tmp_path: Path) -> None:
    config = mixture_of({"a": {"weight": 1.0}, "b": {"weight": 1.0}})
    _, state = run_steps(config, None, steps=1, rows=ROWS, local=ROWS, degree=1)
    content = (tmp_path / "b.jsonl").read_bytes()
    (tmp_path / "b.jsonl").write_bytes(content.replace(b"the", b"eht"))
    with pytest.raises(ConfigError, match="was replaced since the checkpoint"):
        run_steps(config, state, steps=1, rows=ROWS, local=ROWS, degree=1)
    (tmp_path / "b.jsonl").write_bytes(content + b"{}\n")
    with pytest.raises(ConfigError, match="the training data have changed"):
        run_steps(config, state, steps=1, rows=ROWS, local=ROWS, degree=1)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"data.source.sources\[1\].source"):
        loader_of(config, rows=ROWS, local=ROWS, rank=0, degree=1)


def test_the_training_subset_is_of_all_sources(mixture_of: Callable[..., DataConfig]) -> None:
    """Up to where a source has ended, whatever the run does there."""
    config = mixture_of({"a": {"weight": 1.0}, "c": {"weight": 1.0, "at_end": "stop"}})
    options = {"tokenizer": build_tokenizer(config.tokenizer), "seq_len": SEQ_LEN, "batch_size": 3, "dp_rank": 0, "dp_degree": 1}
    rows = [whole for batch in fixed_batches(config, "train", n_rows=10, **options) for row, whole in content(batch) if row >= 0]
    found = {name: sum(row in list(stream_rows(name, 0, 1, passes=1)) for row in rows) for name in "ac"}
    assert found == {"a": 5, "c": 5}
    every = fixed_batches(config, "train", n_rows=10**6, **options)
    n = len(list(stream_rows("c", 0, 1, passes=1)))
    assert every.n_rows == pytest.approx(2 * n, abs=4)


def test_a_row_is_shown(mixture_of: Callable[..., DataConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = mixture_of({"a": {"weight": 1.0}, "b": {"weight": 1.0}})
    loader = loader_of(config, rows=ROWS, local=ROWS, rank=0, degree=1, seq_len=SEQ_LEN)
    tokens = [tokens for batch in (next(loader) for _ in range(3)) for tokens in batch.tokens_BT]
    parts = ", ".join(f'{{source = {{kind = "jsonl", paths = ["{tmp_path}/{name}.jsonl"]}}, weight = 1}}' for name in "ab")
    source = f'{{kind = "mixture", sources = [{parts}]}}'
    tokenizer = build_tokenizer(config.tokenizer)
    for row in (1, 8, 16):
        arguments = ["--data.source", source, "--data.mode", "streamed", "--data.streams", str(ROWS), "--data.tokenizer", "bytes"]
        assert main(["data", "inspect", *arguments, "--row", str(row), "--seq-len", str(SEQ_LEN)]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert "".join(line for line in shown[1:] if not line.startswith("--- ")) == tokenizer.decode(tokens[row].numpy())
