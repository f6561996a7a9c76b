"""Sources that end a run whose mixture is streamed: at the same step in any layout, with nothing in the state that was only looked at."""

import json
import math
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.data.common import agreed_end, content, joined_bytes, loader_of, make_texts, write_jsonl
from titanarch.config.errors import ConfigError
from titanarch.data.config import DataConfig
from titanarch.data.mixed_streams import SourceEnded, source_of
from titanarch.data.row_loader import merge_states
from titanarch.data.rows_ahead import RowsAhead

SEQ_LEN = 16
ROWS = 6
N_STREAMS = 12
LAYOUTS = [(1, 6), (1, 2), (2, 3), (2, 1), (3, 2), (6, 1)]
"""(data-parallel ranks, rows of a micro-batch)."""
TEXTS = {"a": make_texts(60, seed=1), "b": make_texts(24, seed=2), "c": make_texts(40, seed=3, longest=9)}
STOP = {"a": {"weight": 1.0}, "b": {"weight": 0.6, "at_end": "drop"}, "c": {"weight": 0.8, "at_end": "stop"}}
DROP = {"b": {"weight": 1.0, "at_end": "drop"}, "c": {"schedule": [[0, 0.1], [60, 1.0]], "at_end": "drop"}}


@pytest.fixture
def mixture_of(mixture_of: Callable[..., DataConfig]) -> Callable[..., DataConfig]:
    """The same, streamed."""
    return partial(mixture_of, mode="streamed", streams=N_STREAMS)


def run_on(
    config: DataConfig, state: dict[str, Any] | None, *, steps: int, degree: int, local: int, workers: int = 0
) -> tuple[dict[int, bytes], dict[str, Any], str]:
    """``steps`` steps or those that there are: the rows by number, the state, and why the next step cannot be had."""
    section = config.model_copy(update={"workers": workers})
    loaders = [loader_of(section, rows=ROWS, local=local, rank=rank, degree=degree) for rank in range(degree)]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
    seen: dict[int, bytes] = {}
    n_done, reason = 0, agreed_end(loaders)
    while n_done < steps and not reason:
        for loader in loaders:
            for _ in range(loader.accumulation_steps):
                seen.update(content(next(loader)))
        n_done, reason = n_done + 1, agreed_end(loaders)
        assert {loader.next_row for loader in loaders} == {loaders[0].next_row}
    merged = merge_states([loader.state_dict() for loader in loaders])
    for loader in loaders:
        loader.close()
    return seen, merged, reason


def test_it_is_before_the_step_that_lacks_a_row(mixture_of: Callable[..., DataConfig]) -> None:
    """The first row that c is to give of a stream whose last whole row is behind; and c alone, dropped, has no row left over."""
    left = [(len(joined_bytes(TEXTS["c"][stream::N_STREAMS])[0]) - 1) // SEQ_LEN for stream in range(N_STREAMS)]
    row, taken = 0, [0] * N_STREAMS
    while True:
        if source_of(row, N_STREAMS, [1.0, 0.8]) == 1:
            taken[row % N_STREAMS] += 1
            if taken[row % N_STREAMS] > left[row % N_STREAMS]:
                break
        row += 1
    config = mixture_of({"a": {"weight": 1.0}, "c": {"weight": 0.8, "at_end": "stop"}})
    rows, state, reason = run_on(config, None, steps=400, degree=1, local=ROWS)
    assert sorted(rows) == list(range(row // ROWS * ROWS))
    assert reason == f"the source c has ended: row {row} of the run would take tokens of another pass over it"
    assert run_on(config, state, steps=1, degree=2, local=3) == ({}, state, reason), "nor after a restart"
    alone = mixture_of({"c": {"weight": 1.0, "at_end": "drop"}})
    row = min(n * N_STREAMS + stream for stream, n in enumerate(left))
    rows, _, reason = run_on(alone, None, steps=400, degree=2, local=1)
    assert (len(rows), f"row {row} of the run" in reason) == (row // ROWS * ROWS, True)


@pytest.mark.parametrize("parts", [STOP, DROP], ids=["stop", "all dropped"])
def test_layouts_restarts_and_workers_do_not_move_it(parts: dict[str, Any], mixture_of: Callable[..., DataConfig]) -> None:
    draw = random.Random(5)
    config = mixture_of(parts, shuffle_documents=5)
    expected, last, why = run_on(config, None, steps=400, degree=1, local=ROWS)
    assert 10 * ROWS < len(expected) < 100 * ROWS
    assert why.startswith("the source c has ended: row ") or parts is DROP
    for degree, local in LAYOUTS:
        assert run_on(config, None, steps=400, degree=degree, local=local) == (expected, last, why)
    for trial in range(6):
        rows: dict[int, bytes] = {}
        state: dict[str, Any] | None = None
        reason = ""
        while not reason:
            degree, local = draw.choice(LAYOUTS)
            steps = draw.randint(0, len(expected) // ROWS // 2)
            some, state, reason = run_on(config, state, steps=steps, degree=degree, local=local)
            assert not rows.keys() & some.keys()
            rows |= some
        assert (rows, state, reason) == (expected, last, why), f"trial {trial}"
    rows, state, _ = run_on(config, None, steps=7, degree=2, local=3, workers=2)
    rest, state, reason = run_on(config, state, steps=400, degree=2, local=1, workers=2)
    assert (rows | rest, state, reason) == (expected, last, why)


def test_what_was_looked_at_is_not_in_the_state(mixture_of: Callable[..., DataConfig]) -> None:
    """Nor in the counts; and a loader that goes back forgets it."""
    config = mixture_of(STOP)
    looks, waits = (loader_of(config, rows=ROWS, local=3, rank=0, degree=1) for _ in range(2))
    for _ in range(5):
        begin = waits.state_dict()
        expected = [list(content(next(waits))) for _ in range(2)]
        assert [list(content(next(looks))) for _ in range(2)] == expected
        assert looks.ended == ""
        assert (looks.state_dict(), looks.source_epochs, looks.epoch) == (waits.state_dict(), waits.source_epochs, waits.epoch)
        looks.load_state_dict(begin)
        assert looks.ended == ""
        assert [list(content(next(looks))) for _ in range(2)] == expected
    looks.close()
    assert list(content(next(looks))) == list(content(next(waits))), "closing loses no row"


def test_only_what_may_end_is_looked_at(mixture_of: Callable[..., DataConfig]) -> None:
    def refuse(number: float) -> float:
        raise AssertionError("no other rank is asked")

    for last in ("repeat", "drop"):
        config = mixture_of({"a": {"weight": 1.0}, "c": {"weight": 1.0, "at_end": last}})
        loader = loader_of(config, rows=ROWS, local=ROWS, rank=0, degree=1)
        assert loader.ended_for_all(refuse) == ""
        assert loader._rows is None, "nothing is read"  # type: ignore[attr-defined]


def test_what_is_wrong_with_a_row_is_raised_when_it_is_drawn(mixture_of: Callable[..., DataConfig], tmp_path: Path) -> None:
    config = mixture_of(STOP)
    write_jsonl(tmp_path / "a.jsonl", TEXTS["a"][:13])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("no json\n")
    loader = loader_of(config, rows=ROWS, local=2, rank=0, degree=1)
    n_rows = 0
    with pytest.raises(ConfigError, match=r"a.jsonl:14: is not JSON"):
        while True:
            assert loader.ended_for_all(lambda number: number) == ""
            state = loader.state_dict()
            n_rows += len(next(loader).row_B)
            n_rows += sum(len(next(loader).row_B) for _ in range(2))
    assert n_rows >= ROWS
    assert sum(rows for _, rows in state["phases"]) == n_rows // ROWS * ROWS
    few = mixture_of({"a": {"weight": 1.0}, "c": {"weight": 1.0, "at_end": "stop"}})
    write_jsonl(tmp_path / "c.jsonl", TEXTS["c"][:5])
    loader = loader_of(few, rows=ROWS, local=ROWS, rank=0, degree=1)
    with pytest.raises(ConfigError, match=r"has 5 documents, fewer than the 12 streams: set data.streams"):
        list(loader)


def test_a_source_too_small_for_a_step(mixture_of: Callable[..., DataConfig], tmp_path: Path) -> None:
    config = mixture_of({"a": {"weight": 1.0}, "c": {"weight": 30.0, "at_end": "stop"}})
    write_jsonl(tmp_path / "c.jsonl", ["x"] * N_STREAMS)
    rows, state, reason = run_on(config, None, steps=1, degree=3, local=1)
    assert (rows, state["phases"]) == ({}, [[SEQ_LEN, 0]])
    assert reason == "the source c has ended: row 1 of the run would take tokens of another pass over it"


def test_the_first_row_decides() -> None:
    """Two ranks read rows 6 to 9 in turn; what is wrong with a row is raised before an end, and behind it not looked at."""

    def end(row: int, source: int) -> SourceEnded:
        return pickle.loads(pickle.dumps(SourceEnded(row, source, "ab"[source])))

    def least(wrong: dict[int, ConfigError]) -> tuple[float, str]:
        def read(row: int) -> Any:
            if row in wrong:
                raise wrong[row]
            return f"row {row}"

        ranks = [RowsAhead(["a", "b"]) for _ in range(2)]
        for rank, ahead in enumerate(ranks):
            ahead.look(range(6 + rank, 10, 2), read)
        number = min(ahead.lacking for ahead in ranks)
        (why,) = {ahead.why(number) for ahead in ranks}
        return number, why

    assert least({}) == (math.inf, "")
    assert least({9: end(9, 1), 7: end(7, 0)})[1].startswith("the source a has ended: row 7 ")
    assert least({9: end(9, 0), 8: end(8, 1)})[1].startswith("the source b has ended: row 8 ")
    assert least({8: ConfigError("bad"), 9: end(9, 1)})[1] == ""
    assert least({8: end(8, 1), 9: ConfigError("bad")})[1].startswith("the source b has ended: row 8 ")
    ahead = RowsAhead(["a", "b"])

    def wrong(row: int) -> Any:
        raise end(10**12, 1)

    ahead.look(range(10**12, 10**12 + 9), wrong)
    assert ahead.why(ahead.lacking).startswith(f"the source b has ended: row {10**12} ")
    for _ in range(2):
        with pytest.raises(SourceEnded, match="the source b has ended"):
            ahead.take()
