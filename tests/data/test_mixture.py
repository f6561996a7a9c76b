"""Mixtures: shares after any number of rows, ends of sources, and the same rows in any layout."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.common import content, drawn_phases, joined_bytes, loader_of, make_texts, naive_row, phases_of, run_steps, write_jsonl
from titanarch.config.errors import ConfigError
from titanarch.data import mixture
from titanarch.data.config import DataConfig
from titanarch.data.fixed import fixed_batches
from titanarch.data.mixture import MixtureOrder, MixturePlan, Part
from titanarch.data.phased_mixture import PhasedMixture
from titanarch.data.phases import Phase, Phases
from titanarch.data.tokenizers import build_tokenizer

SEQ_LEN = 16
ROWS = 6
ENDLESS = 10**9
TEXTS = {"a": make_texts(30, seed=1), "b": make_texts(12, seed=2), "c": make_texts(20, seed=3, longest=9)}


def order_of(*schedules: list[tuple[int, float]], sizes: list[int] | None = None, phases: Phases | None = None) -> MixtureOrder:
    """An order of endless sources, or of dropped ones with ``sizes`` rows."""
    n_rows = sizes or [ENDLESS] * len(schedules)
    return MixtureOrder([Part(f"s{i}", tuple(knots), n_rows[i], sizes is not None) for i, knots in enumerate(schedules)], phases)


def due_of(schedules: list[list[tuple[int, float]]], n: int) -> np.ndarray:
    """Rows due to each source after 0 to n rows, [n + 1, sources], by summing shares over hundredths of a row."""
    x = (np.arange(100 * n) + 0.5) / 100
    knots = sorted({row for schedule in schedules for row, _ in schedule})
    weights = [np.interp(knots, *zip(*schedule, strict=True)) for schedule in schedules]
    shares = np.stack([np.interp(x, knots, weight / sum(weights)) for weight in weights])
    return np.concatenate([np.zeros((1, len(schedules))), shares.reshape(len(schedules), n, 100).mean(2).T.cumsum(0)])


SCHEDULES: list[list[list[tuple[int, float]]]] = [
    [[(0, 1.0)]],
    [[(0, 0.7)], [(0, 0.3)]],
    [[(0, 5.0)], [(0, 1.0)], [(0, 0.1)], [(0, 3.3)], [(0, 0.001)]],
    [[(0, 1.0)]] * 7,
    [[(0, 0.7), (300, 0.3)], [(0, 0.3), (300, 0.7)]],
    [[(0, 1.0), (100, 0.0)], [(0, 0.0), (100, 1.0), (250, 1.0), (251, 0.0)], [(0, 0.0), (200, 0.0), (400, 3.0)]],
]


@pytest.mark.parametrize("schedules", SCHEDULES)
def test_shares_are_within_a_row_after_any_number_of_rows(schedules: list[list[tuple[int, float]]]) -> None:
    n = 600
    rows = order_of(*schedules).take(n)
    taken = np.concatenate([np.zeros((1, len(schedules))), np.cumsum(rows.source_N[:, None] == np.arange(len(schedules)), axis=0)])
    assert np.abs(taken - due_of(schedules, n)).max() <= 1 + 1e-3
    for i in range(len(schedules)):
        assert rows.index_N[rows.source_N == i].tolist() == list(range(int(taken[-1, i])))


def test_far_from_the_start() -> None:
    """After 10^9 rows, where every source is even, the order is that of the first rows."""
    order = order_of([(0, 0.6)], [(0, 0.25)], [(0, 0.15)])
    counts = [600_000_000, 250_000_000, 150_000_000]
    order.load_state_dict({"row": 10**9, "taken": counts, "since": 0, "taken_then": [0, 0, 0]})
    source = order.take(2000).source_N
    assert source.tolist() == order_of([(0, 0.6)], [(0, 0.25)], [(0, 0.15)]).take(2000).source_N.tolist()


def test_a_dropped_source_leaves_its_share() -> None:
    order = order_of([(0, 0.5)], [(0, 0.3)], [(0, 0.2)], sizes=[ENDLESS, 30, ENDLESS])
    source = order.take(500).source_N
    last = int(np.flatnonzero(source == 1)[29])
    assert (source == 1).sum() == 30
    assert abs(last - 100) <= 4
    since = np.cumsum(source[last + 1 :] == 0)
    assert np.abs(since - np.arange(1, len(since) + 1) * 5 / 7).max() <= 1
    only = order_of([(0, 1.0)], [(0, 1.0)], sizes=[5, 9])
    assert Counter(only.take(14).source_N.tolist()) == {0: 5, 1: 9}


def test_nothing_left_with_a_weight() -> None:
    order = order_of([(0, 1.0)], [(0, 1.0), (50, 0.0)], sizes=[10, ENDLESS])
    with pytest.raises(ConfigError, match=r"without s0, dropped at row \d+, every weight is 0 at row 50"):
        order.take(60)
    phases = phases_of((4, 8, 5), (16, 8, None))  # 40 rows of a quarter, so row 24 begins window 6
    order = order_of([(0, 1.0)], [(0, 1.0), (50, 0.0)], sizes=[4, ENDLESS], phases=phases)
    with pytest.raises(ConfigError, match=r"without s0, dropped at row 24, every weight is 0 at row 50"):
        order.take(60)


def test_a_plan_is_the_order_from_any_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in any sequence, more chunks than are held, and states that a new plan begins at; two sources are dropped on the way."""
    monkeypatch.setattr(mixture, "PLAN_CHUNK", 8)
    monkeypatch.setattr(mixture, "PLAN_CHUNKS", 2)
    schedules, sizes = [[(0, 0.5)], [(0, 0.3), (90, 0.8)], [(0, 0.2)]], [ENDLESS, 30, 25]
    whole = order_of(*schedules, sizes=sizes).take(400)
    draw = random.Random(2)
    plan = MixturePlan(order_of(*schedules, sizes=sizes))
    begin = 0
    for _ in range(40):
        first, n = draw.randint(begin, 350), draw.randint(1, 40)
        rows = plan.rows(first, n)
        np.testing.assert_array_equal(rows.source_N, whole.source_N[first : first + n])
        np.testing.assert_array_equal(rows.index_N, whole.index_N[first : first + n])
        row = draw.randint(begin, 300)
        state = plan.state(row)
        assert state["taken"] == [(whole.source_N[:row] == i).sum() for i in range(3)]
        if draw.random() < 0.3:
            plan, begin = MixturePlan(order_of(*schedules, sizes=sizes)), row
            plan.begin_at(state)


def drawn_parts(draw: random.Random, n_rows: int) -> list[Part]:
    """Up to four sources: the first one with a weight that is above 0, some of the others dropped; rows of weights lie below ``n_rows``."""
    parts = []
    for i in range(draw.randint(1, 4)):
        rows = sorted(draw.sample(range(1, n_rows), draw.choice([0, 0, 1, 3])))
        knots = tuple((row, draw.choice([0.0, 0.3, 1.0, 4.0]) + (i == 0)) for row in [0, *rows])
        parts.append(Part(f"s{i}", knots, draw.choice([1, 4, 15, 60]), i > 0 and draw.random() < 0.4))
    return parts


Place = tuple[int, int, int, int]
"""Of a row of a source: the epoch, the place in it, the part and the number of parts."""


def rows_of(plan: PhasedMixture, parts: list[Part], first_row: int, n_rows: int) -> list[tuple[int, Place]]:
    """The source of each row, all of one phase, and its place there."""
    rows = plan.rows(first_row, n_rows)
    places: dict[int, list[Place]] = {}
    for i, part in enumerate(parts):
        own_N = np.flatnonzero(rows.source_N == i)
        if len(own_N):
            spans = plan.spans(i, first_row, int(rows.index_N[own_N[0]]), len(own_N), n_windows=part.n_rows)
            places[i] = [(*divmod(s.place + k, part.n_rows), s.part, s.n_parts) for s in spans for k in range(s.n_rows)]
    return [(source, places[source].pop(0)) for source in rows.source_N.tolist()]


@pytest.mark.parametrize("seed", range(25))
def test_phases_use_every_part_of_every_source_once_in_their_shares(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the phases, weights and ends of sources; and the same rows after going on from any row."""
    monkeypatch.setattr(mixture, "PLAN_CHUNK", 16)
    monkeypatch.setattr(mixture, "PLAN_CHUNKS", 2)
    draw = random.Random(seed)
    phases = drawn_phases(draw, 12)
    n_steps = phases.parts[-1].first_step + draw.randint(1, 20)
    n_rows = phases.rows_before(n_steps)
    parts = drawn_parts(draw, n_rows)

    def plan_of() -> PhasedMixture:
        return PhasedMixture(MixturePlan(MixtureOrder(parts, phases)), phases)

    plan, seen, taken = plan_of(), list[tuple[int, Place]](), [plan_of().taken(0)]
    for step in range(n_steps):
        seen += rows_of(plan, parts, phases.rows_before(step), phases.at_step(step).global_batch_size)
        taken.append(plan.taken(len(seen)))
    for i, part in enumerate(parts):
        used = [
            (epoch, place * 12 + number * 12 // n_parts + t)
            for source, (epoch, place, number, n_parts) in seen
            if source == i
            for t in range(12 // n_parts)
        ]
        assert sorted(used) == [divmod(t, part.n_rows * 12) for t in range(len(used))], "each token once, none left out"
        assert [epoch for epoch, _ in used] == sorted(epoch for epoch, _ in used), "an epoch ends before the next begins"
        assert len(used) <= part.n_rows * 12 or not part.dropped_at_end
        assert taken[-1][i] == pytest.approx(len(used) / 12)
    if not any(part.dropped_at_end for part in parts):
        size_N = np.array([phases.at_row(row).seq_len / 12 for row in range(n_rows)])
        due = np.cumsum(np.diff(due_of([list(part.knots) for part in parts], n_rows), axis=0) * size_N[:, None], axis=0)
        row_S = [phases.rows_before(step) for step in range(1, n_steps + 1)]
        assert np.abs(np.array(taken[1:]) - due[np.array(row_S) - 1]).max() <= 1.01
    for _ in range(8):
        step = draw.randrange(n_steps)
        row, n = phases.rows_before(step), phases.at_step(step).global_batch_size
        first, some = plan_of(), plan_of()
        state = plan.state(row)
        assert state["row"] == phases.windows_before(row if phases.at_row(row).seq_len == 12 else phases.at_row(row).first_row)
        first.begin_at(json.loads(json.dumps(state)))
        assert first.taken(row) == pytest.approx(taken[step])
        assert [rows_of(each, parts, row, n) for each in (first, some)] == [seen[row : row + n]] * 2


def windows_of(name: str) -> list[bytes]:
    tokens, begins = joined_bytes(TEXTS[name])
    return [naive_row(tokens, begins, start, SEQ_LEN) for start in range(0, len(tokens) - SEQ_LEN, SEQ_LEN)]


def test_each_source_has_its_rows_in_turn(mixture_of: Callable[..., DataConfig]) -> None:
    """Source b is passed twice while a is passed once, and c is dropped after a pass; each pass has every row once."""
    n = {name: len(windows_of(name)) for name in TEXTS}
    parts = {"a": {"weight": n["a"]}, "b": {"weight": 2 * n["b"]}, "c": {"weight": 3 * n["c"], "at_end": "drop"}}
    config = mixture_of(parts)
    n_rows = n["a"] + 2 * n["b"] + n["c"]
    rows, state = run_steps(config, None, steps=n_rows // ROWS, rows=ROWS, local=ROWS, degree=1)
    expected = Counter(windows_of("a") + 2 * windows_of("b") + windows_of("c"))
    seen = Counter(rows.values())
    assert sum((seen - expected).values()) <= 3  # less than a row a source, and what does not divide by the step, is another row
    assert sum((expected - seen).values()) <= 3 + ROWS
    assert state["mixture"]["taken"][2] == n["c"]
    loader = loader_of(config, rows=ROWS, local=ROWS, rank=0, degree=1)
    loader.load_state_dict(state)
    assert loader.source_epochs == {name: taken / n[name] for name, taken in zip(TEXTS, state["mixture"]["taken"], strict=True)}
    assert loader.epoch == min(taken // n[name] for name, taken in zip(TEXTS, state["mixture"]["taken"], strict=True))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_layouts_restarts_and_workers_change_nothing(packing: str, mixture_of: Callable[..., DataConfig]) -> None:
    parts = {"a": {"schedule": [[0, 0.1], [90, 0.6]]}, "b": {"weight": 0.3}, "c": {"weight": 0.3, "at_end": "drop"}}
    config = mixture_of(parts, packing=packing)
    expected, _ = run_steps(config, None, steps=24, rows=ROWS, local=ROWS, degree=1)
    with_workers = 2 if packing == "best_fit" else 0
    rows: dict[int, bytes] = {}
    state: dict[str, Any] | None = None
    for steps, degree, local, workers in ((5, 2, 3, 0), (1, 3, 2, 0), (4, 1, 2, with_workers), (0, 2, 1, 0), (14, 2, 1, 0)):
        section = config.model_copy(update={"workers": workers})
        part, state = run_steps(section, state, steps=steps, rows=ROWS, local=local, degree=degree)
        assert not rows.keys() & part.keys()
        rows |= part
    assert rows == expected


@pytest.mark.parametrize(("packing", "seed"), [("concat", 0), ("concat", 1), ("best_fit", 2), ("best_fit", 3)])
def test_runs_of_phases_go_on_anywhere(packing: str, seed: int, mixture_of: Callable[..., DataConfig]) -> None:
    """At any step, on other ranks, micro-batches and workers: bitwise the same rows, each once."""
    parts = {"a": {"schedule": [[0, 0.1], [90, 0.6]]}, "b": {"weight": 0.3}, "c": {"weight": 0.3, "at_end": "drop"}}
    config = mixture_of(parts, packing=packing)
    draw = random.Random(seed)

    def run(state: dict[str, Any] | None, steps: int, degree: int, local: int, workers: int) -> tuple[dict[int, bytes], dict[str, Any]]:
        earlier = [Phase(4, 12, local, 4), Phase(16, 6, local, 1), Phase(8, 6, local, 5)]
        section = config.model_copy(update={"workers": workers})
        return run_steps(section, state, steps=steps, rows=ROWS, local=local, degree=degree, earlier=earlier)

    expected, end = run(None, 16, 1, ROWS, 0)
    assert sorted(expected) == list(range(4 * 12 + 12 * 6))
    rows: dict[int, bytes] = {}
    state, left = None, 16
    while left:
        steps, (degree, local) = min(left, draw.randint(1, 5)), draw.choice([(1, 2), (2, 3), (2, 1), (3, 2), (3, 1)])
        part, state = run(state, steps, degree, local, 2 if seed == 2 else 0)
        assert not rows.keys() & part.keys()
        rows |= part
        left -= steps
    assert (rows, state) == (expected, end)


@pytest.mark.parametrize("at_end", ["stop", "drop"])
def test_a_source_that_ends_in_a_phase_of_shorter_rows(at_end: str, mixture_of: Callable[..., DataConfig]) -> None:
    """Each part of each of its windows is used once, in windows of the source, and none a second time."""
    config = mixture_of({"a": {"weight": 0.5}, "b": {"weight": 0.5, "at_end": at_end}})
    tokens, begins = joined_bytes(TEXTS["b"])
    n_windows = len(windows_of("b"))
    loader = loader_of(config, rows=ROWS, local=ROWS, rank=0, degree=1, earlier=[Phase(4, ROWS, ROWS, 4 * n_windows)])
    used: list[list[int]] = []
    while not loader.ended and loader.next_row < 12 * n_windows:
        batch = next(loader)
        assert batch.origin_BI is not None
        for (_, whole), origin in zip(content(batch), batch.origin_BI.tolist(), strict=True):
            source, epoch, window, part, n_parts = origin
            if source == 1:
                assert (epoch, n_parts, whole) == (0, 4, naive_row(tokens, begins, window * SEQ_LEN + part * 4, 4))
                used.append([window, part])
    assert len({tuple(each) for each in used}) == len(used), "no part twice"
    if at_end == "drop":
        assert not loader.ended
        assert sorted(used) == [[window, part] for window in range(n_windows) for part in range(4)]
        assert loader.source_epochs["b"] == 1.0
        return
    assert 4 * n_windows - ROWS < len(used) <= 4 * n_windows
    end = f"the source b has ended: its {n_windows} rows of 16 tokens do not last to row {loader.next_row + ROWS} of the run"
    assert loader.ended == end
    assert loader.source_epochs["b"] == len(used) / (4 * n_windows)
    with pytest.raises(ConfigError, match="the source b has ended"):
        next(loader)


def test_weights_are_shares_of_tokens(mixture_of: Callable[..., DataConfig]) -> None:
    """With padding, a source of short documents has more rows, so that half of the tokens are its own."""
    config = mixture_of({"a": {"weight": 1.0}, "c": {"weight": 1.0}}, packing="padded")
    real = {name: sum(min(len(text.encode()) + 1, SEQ_LEN) for text in TEXTS[name]) / len(TEXTS[name]) for name in "ac"}
    _, state = run_steps(config, None, steps=50, rows=ROWS, local=ROWS, degree=1)
    share = real["c"] / (real["a"] + real["c"])
    assert abs(state["mixture"]["taken"][0] - 50 * ROWS * share) <= 1
    assert abs(share - 0.5) > 0.01


def test_a_source_that_ends_the_run(mixture_of: Callable[..., DataConfig]) -> None:
    config = mixture_of({"a": {"weight": 0.5}, "b": {"weight": 0.5, "at_end": "stop"}})
    n_windows = len(windows_of("b"))
    loader = loader_of(config, rows=ROWS, local=ROWS, rank=0, degree=1)
    steps = 0
    while not loader.ended:
        next(loader)
        steps += 1
    assert steps == 2 * n_windows // ROWS
    assert loader.ended == f"the source b has ended: its {n_windows} rows do not last to row {(steps + 1) * ROWS} of the run"
    with pytest.raises(ConfigError, match="the source b has ended"):
        next(loader)
    last = mixture_of({"b": {"weight": 1.0, "at_end": "drop"}})
    dropped = loader_of(last, rows=n_windows, local=n_windows, rank=0, degree=1)
    next(dropped)
    assert dropped.ended.startswith("the source b has ended")


def test_the_training_subset_has_the_shares(mixture_of: Callable[..., DataConfig]) -> None:
    """8 rows: 6 of a and 2 of c, spread evenly over each; all rows of a source where it has fewer."""
    options = {"seq_len": SEQ_LEN, "batch_size": 3, "dp_rank": 0, "dp_degree": 1}
    config = mixture_of({"a": {"weight": 3.0}, "c": {"weight": 1.0}})
    batches = fixed_batches(config, "train", tokenizer=build_tokenizer(config.tokenizer), n_rows=8, **options)
    rows = [whole for batch in batches for row, whole in content(batch) if row >= 0]
    n = {name: -(-(len(joined_bytes(TEXTS[name])[0]) - 1) // SEQ_LEN) for name in "ac"}
    expected = [windows_of("a")[i * n["a"] // 6] for i in range(6)] + [windows_of("c")[i * n["c"] // 2] for i in range(2)]
    assert sorted(rows) == sorted(expected)
    every = fixed_batches(config, "train", tokenizer=build_tokenizer(config.tokenizer), n_rows=10**6, **options)
    assert n["c"] < every.n_rows <= n["a"] + n["c"]


def test_what_is_wrong_with_a_source_names_it(mixture_of: Callable[..., DataConfig], tmp_path: Path) -> None:
    config = mixture_of({"a": {"weight": 1.0}, "b": {"weight": 1.0}})
    write_jsonl(tmp_path / "b.jsonl", ["short"])
    with pytest.raises(ConfigError, match=r"\[training\] seq_len: in the source b, the training data have 6 tokens, too few for one row"):
        loader_of(config, rows=1, local=1, rank=0, degree=1)
    (tmp_path / "b.jsonl").write_text("no json")
    with pytest.raises(ConfigError, match=r"b.jsonl:1: is not JSON"):
        loader_of(config, rows=1, local=1, rank=0, degree=1)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"data.source.sources\[1\].source"):
        loader_of(config, rows=1, local=1, rank=0, degree=1)
