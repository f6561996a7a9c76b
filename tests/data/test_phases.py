"""Phases: where each begins, and that short rows and long ones use every token of an epoch once."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.data.common import data_config, drawn_phases, joined_bytes, naive_row, phases_of, run_steps, write_jsonl
from titanarch.config.errors import ConfigError
from titanarch.data.config import DataConfig
from titanarch.data.phased_windows import PhasedWindows, problems
from titanarch.data.phases import Phase, Phases

THREE = phases_of((2, 8, 5), (4, 6, 4), (8, 4, None))


def test_where_phases_begin() -> None:
    assert [(p.first_step, p.first_row, p.first_token) for p in THREE.parts] == [(0, 0, 0), (5, 40, 80), (9, 64, 176)]
    assert [THREE.at_step(step).seq_len for step in (0, 4, 5, 8, 9, 1000)] == [2, 2, 4, 4, 8, 8]
    assert [THREE.at_row(row).seq_len for row in (0, 39, 40, 63, 64, 10**9)] == [2, 2, 4, 4, 8, 8]
    for step in range(30):
        assert THREE.step_of(THREE.rows_before(step)) == step
        assert THREE.steps_for(THREE.tokens_before(step)) == step
        assert THREE.steps_for(THREE.tokens_before(step) + 1) == step + 1
    assert THREE.tokens_before(12) == 5 * 16 + 4 * 24 + 3 * 32
    with pytest.raises(ValueError, match="row 41 does not begin a step of 6 rows"):
        THREE.step_of(41)


def test_the_state_says_how_many_rows_of_each_length() -> None:
    assert [THREE.state(row) for row in (0, 8, 40, 46, 64, 72)] == [
        [[2, 0]],
        [[2, 8]],
        [[2, 40]],
        [[2, 40], [4, 6]],
        [[2, 40], [4, 24]],
        [[2, 40], [4, 24], [8, 8]],
    ]


def drawn(seed: int) -> tuple[Phases, int]:
    """Phases of rows of up to 12 tokens, and windows of an epoch."""
    draw = random.Random(seed)
    return drawn_phases(draw, 12), draw.choice([1, 2, 5, 11, 40])


@pytest.mark.parametrize(("phases", "n_windows"), [*((THREE, n) for n in (3, 7, 10, 11, 22, 1000)), *map(drawn, range(20))])
def test_every_token_of_an_epoch_is_used_once(phases: Phases, n_windows: int) -> None:
    """Also where a phase begins inside an epoch, ends inside one, or has several."""
    n_steps = phases.parts[-1].first_step + 21
    spans = PhasedWindows(phases, n_windows).spans(0, phases.rows_before(n_steps))
    assert sum(span.n_rows for span in spans) == phases.rows_before(n_steps)
    used: list[tuple[int, int]] = []  # the epoch and the token of each place of the rows
    for span in spans:
        assert span.n_rows > 0
        length = phases.longest // span.n_parts
        for place in range(span.place, span.place + span.n_rows):
            epoch, window = divmod(place, n_windows)
            assert (span.place + span.n_rows - 1) // n_windows == epoch or span.n_parts == 1
            used += [(epoch, window * phases.longest + span.part * length + t) for t in range(length)]
    assert len(used) == len(set(used)) == phases.tokens_before(n_steps)
    assert sorted(used) == [divmod(t, n_windows * phases.longest) for t in range(len(used))], "none is left out"
    begins = [epoch for epoch, _ in used]
    assert begins == sorted(begins), "an epoch ends before the next begins"


@pytest.mark.parametrize("first_row", [0, 5, 39, 40, 47, 64, 70])
def test_rows_are_the_same_however_many_are_read(first_row: int) -> None:
    windows = PhasedWindows(THREE, 7)
    whole = [(s.place + i, s.part, s.n_parts) for s in windows.spans(0, 90) for i in range(s.n_rows)]
    for n_rows in (1, 3, 20):
        part = [(s.place + i, s.part, s.n_parts) for s in windows.spans(first_row, n_rows) for i in range(s.n_rows)]
        assert part == whole[first_row : first_row + n_rows]


def test_passes_follow_the_tokens() -> None:
    for step in range(20):
        assert THREE.windows_before(THREE.rows_before(step)) == THREE.tokens_before(step) / 8
    assert [THREE.row_of(window) for window in (0, 9, 10, 11, 21, 22, 23, 500)] == [0, 36, 40, 42, 62, 64, 65, 542]
    assert THREE.parts_of_window == 4
    assert phases_of((4, 1, 3), (6, 1, 2), (12, 1, None)).parts_of_window == 6


def test_a_run_of_one_length_reads_its_windows_in_order() -> None:
    windows = PhasedWindows(phases_of((8, 4, None)), 5)
    assert [span.place + i for span in windows.spans(3, 12) for i in range(span.n_rows)] == list(range(3, 15))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((3, 4, 2), (8, 4, None)), "rows of 3 tokens do not divide rows of 8"),
        (((2, 3, 3), (8, 4, None)), "9 rows of 2 tokens do not fill whole rows of 8: make its steps times its rows a multiple of 4"),
        (((8, 4, 2), (4, 4, None)), "the last phase has the longest rows, and 4 tokens are fewer than 8"),
    ],
)
def test_lengths_that_do_not_fit(sizes: tuple[tuple[int, int, int | None], ...], message: str) -> None:
    ((_, found),) = problems(phases_of(*sizes))
    assert message in found


EARLIER = (Phase(8, 6, 3, 4), Phase(16, 12, 3, 2))  # 24 rows of 8 tokens, 24 of 16, then rows of 32
TEXTS = [f"{random.Random(n).getrandbits(4 * size):x}" for n, size in enumerate((40, 700, 33, 90, 512, 2000) * 3)]  # no 8 characters alike


def of_steps(config: DataConfig, state: dict[str, Any] | None, steps: int, *, local: int = 6, degree: int = 1, first: int = 3):
    """12 rows a step after the phases, whose micro-batches have ``first`` rows."""
    earlier = [replace(phase, local_batch_size=first) for phase in EARLIER]
    return run_steps(config, state, steps=steps, rows=12, local=local, degree=degree, seq_len=32, earlier=earlier)


@pytest.fixture
def configs(tmp_path: Path) -> dict[str, DataConfig]:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    source = {"kind": "jsonl", "paths": [str(path)]}
    indexed = data_config(tmp_path / "cache", source=source)
    return {
        "indexed": indexed,
        "workers": indexed.model_copy(update={"workers": 2}),
        "streamed": data_config(tmp_path / "cache", source=source, mode="streamed", streams=12),
        "streamed workers": data_config(tmp_path / "cache", source=source, mode="streamed", streams=12, workers=2),
    }


def test_rows_of_phases_are_windows_of_the_corpus(configs: dict[str, DataConfig]) -> None:
    seen, _ = of_steps(configs["indexed"], None, 9)
    tokens, begins = joined_bytes(TEXTS)
    assert sorted(seen) == list(range(4 * 6 + 2 * 12 + 3 * 12))
    for first, last, length in ((0, 24, 8), (24, 48, 16), (48, 84, 32)):
        windows = {naive_row(tokens, begins, start, length): start for start in range(0, len(tokens) - 1 - length, length)}
        starts = {windows[seen[row]] // 32 for row in range(first, last)}
        assert len(starts) == (last - first) * length // 32, "each phase uses whole windows of the longest rows"


@pytest.mark.parametrize("mode", ["indexed", "streamed"])
def test_a_run_of_phases_goes_on_anywhere(configs: dict[str, DataConfig], mode: str) -> None:
    """Inside a phase, where one begins, with workers, with other micro-batches, on two ranks."""
    whole, end = of_steps(configs[mode], None, 9)
    for steps in (1, 4, 5, 6):
        begun, state = of_steps(configs[f"{mode} workers" if mode == "streamed" else "workers"], None, steps)
        rest, last = of_steps(configs[mode], state, 9 - steps, degree=2, local=6)
        assert begun | rest == whole, f"resumed after step {steps}"
        assert last == end


def test_a_state_of_other_phases_is_refused(configs: dict[str, DataConfig]) -> None:
    _, state = of_steps(configs["indexed"], None, 5)
    message = r"stands after 24 rows of 8 tokens and 12 rows of 16 tokens; from row 0 on the run has 6 rows of 8 tokens a step"
    with pytest.raises(ConfigError, match=message):
        run_steps(configs["indexed"], state, steps=1, rows=12, local=6, degree=1, seq_len=32, earlier=[Phase(8, 6, 3, 8)])
