"""Streams that another rank goes on with where a phase changes the batch: the same rows at the same steps, whatever the layout."""

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.data.common import agreed_end, content, exchange, loader_of, make_texts, run_steps, write_jsonl
from titanarch.cli.main import main
from titanarch.data import stream_groups
from titanarch.data.config import DataConfig
from titanarch.data.layout import RunLayout
from titanarch.data.phases import Phase, Phases
from titanarch.data.row_loader import merge_states
from titanarch.data.tokenizers.bytes import BytesConfig, BytesTokenizer

SEQ_LEN = 16
N_STREAMS = 24
BATCHES = (4, 6, 8, 12, 24)
TEXTS = {"a": make_texts(120, seed=1), "b": make_texts(48, seed=2), "c": make_texts(72, seed=3, longest=9)}
STOP = {"a": {"weight": 1.0}, "b": {"weight": 0.6, "at_end": "drop"}, "c": {"weight": 0.7, "at_end": "stop"}}
ENDLESS = {"a": {"weight": 1.0}, "b": {"weight": 1.0, "at_end": "drop"}, "c": {"schedule": [[0, 0.1], [90, 2.0]]}}

Sizes = tuple[int, int, int]
"""Tokens of a row, rows of a step, steps."""


def drawn_sizes(draw: random.Random, lengths: Sequence[int]) -> list[Sizes]:
    """Of four phases, each with another batch than the one before; what the last one says of steps is where the test ends."""
    batches = [draw.choice(BATCHES)]
    while len(batches) < 4:
        batches.append(draw.choice([rows for rows in BATCHES if rows != batches[-1]]))
    return [(draw.choice(lengths), rows, draw.randint(1, 5)) for rows in batches]


def drawn_layout(draw: random.Random, sizes: Sequence[Sizes]) -> tuple[int, list[int]]:
    """Data-parallel ranks, and rows of a micro-batch in each phase."""
    degree = draw.choice([n for n in (1, 2, 3, 4) if all(rows % n == 0 for _, rows, _ in sizes)])
    return degree, [draw.choice([n for n in range(1, rows + 1) if rows % (n * degree) == 0]) for _, rows, _ in sizes]


def options_of(sizes: Sequence[Sizes], local: Sequence[int]) -> dict[str, Any]:
    """What ``loader_of`` wants of them."""
    phases = [Phase(seq_len, rows, n, steps) for (seq_len, rows, steps), n in zip(sizes, local, strict=True)]
    last = phases.pop()
    return {"seq_len": last.seq_len, "rows": last.global_batch_size, "local": last.local_batch_size, "earlier": phases}


class Run:
    """A run of phases as a trainer has it: rows by number, and the state to go on from."""

    def __init__(self, config: DataConfig, sizes: Sequence[Sizes]) -> None:
        self.config, self.sizes = config, sizes
        self.step, self.n_exchanges, self.reason = 0, 0, ""
        self.rows: dict[int, bytes] = {}
        self.state: dict[str, Any] | None = None

    @property
    def n_steps(self) -> int:
        return sum(steps for _, _, steps in self.sizes)

    def start(self, until: int, degree: int, local: Sequence[int], *, workers: int = 0) -> None:
        """Make the steps before step ``until``, or those that there are."""
        config = self.config.model_copy(update={"workers": workers})
        loaders = [loader_of(config, rank=rank, degree=degree, **options_of(self.sizes, local)) for rank in range(degree)]
        for loader in loaders if self.state is not None else ():
            loader.load_state_dict(json.loads(json.dumps(self.state)))
        self.reason = agreed_end(loaders)
        while self.step < until and not self.reason:
            for loader in loaders:
                for _ in range(loader.accumulation_steps):
                    new = dict(content(next(loader)))
                    assert not self.rows.keys() & new.keys()
                    self.rows |= new
            self.step += 1
            before = merge_states([loader.state_dict() for loader in loaders])
            self.n_exchanges += exchange(loaders)
            self.reason = agreed_end(loaders)
            self.state = merge_states([loader.state_dict() for loader in loaders])
            assert self.state == before, "neither the exchange nor looking ahead moves a stream"
        for loader in loaders:
            loader.close()


@pytest.mark.parametrize("seed", range(30))
def test_owners_are_who_has_the_rows(seed: int) -> None:
    draw = random.Random(seed)
    sizes = drawn_sizes(draw, [SEQ_LEN])
    degree, local = drawn_layout(draw, sizes)
    options = options_of(sizes, local)
    phases = Phases.of([*options["earlier"], Phase(SEQ_LEN, options["rows"], options["local"])])
    layouts = [RunLayout(phases, rank, degree) for rank in range(degree)]
    before: list[int] = []
    for phase in phases.parts:
        found = [-1] * N_STREAMS
        for rank, layout in enumerate(layouts):
            at = layout.at_step(phase.first_step)
            for step in range(phase.first_step, phase.first_step + N_STREAMS // phase.global_batch_size):
                for m in range(at.accumulation_steps):
                    for row in range(at.first_row(step, m), at.first_row(step, m) + phase.local_batch_size):
                        assert found[row % N_STREAMS] == -1
                        found[row % N_STREAMS] = rank
            assert sorted(at.streams(N_STREAMS)) == [stream for stream, owner in enumerate(found) if owner == rank]
        assert layouts[0].at_step(phase.first_step).owners(N_STREAMS).tolist() == found
        if before:
            assert {layout.streams_move(phase.first_step, N_STREAMS) for layout in layouts} == {before != found}
        before = found


CASES = [
    ("concat", None, [8, 16]),
    ("padded", None, [8, 16]),
    ("best_fit", None, [SEQ_LEN]),
    ("concat", STOP, [8, 16]),
    ("best_fit", ENDLESS, [SEQ_LEN]),
]


@pytest.fixture(params=CASES, ids=["concat", "padded", "best_fit", "mixture that ends", "mixture by best_fit"])
def case(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    config_of: Callable[..., DataConfig],
    mixture_of: Callable[..., DataConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[DataConfig, list[int]]:
    """A [data] section, and what lengths its phases may have. Groups of documents are small, so that many begin in a phase."""
    monkeypatch.setattr(stream_groups, "FIRST_ROWS", 2)
    monkeypatch.setattr(stream_groups, "MOST_ROWS", 5)
    packing, parts, lengths = request.param
    options = {"mode": "streamed", "streams": N_STREAMS, "packing": packing, "shuffle_documents": 5}
    if parts is not None:
        return mixture_of(parts, **options), lengths
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS["a"])
    return config_of(source={"kind": "jsonl", "paths": [str(path)]}, **options), lengths


def test_rows_are_the_same_on_any_layouts_over_restarts(case: tuple[DataConfig, list[int]]) -> None:
    """A start on each side of every change and at it, and starts at random steps, each on another layout."""
    config, lengths = case
    draw, n_exchanges = random.Random(f"{config.packing} {config.source.kind}"), 0
    for _ in range(2):
        sizes = drawn_sizes(draw, lengths)
        expected = Run(config, sizes)
        expected.start(expected.n_steps, 1, [rows for _, rows, _ in sizes])
        assert expected.n_exchanges == 0, "one rank has all streams"
        ends = [sum(steps for _, _, steps in sizes[: i + 1]) for i in range(3)]
        stops = [ends, [step - 1 for step in ends], [step + 1 for step in ends], sorted(draw.choices(range(expected.n_steps), k=4))]
        for until in stops:
            run = Run(config, sizes)
            for step in [*until, run.n_steps]:
                run.start(step, *drawn_layout(draw, sizes))
            assert (run.rows, run.state, run.reason) == (expected.rows, expected.state, expected.reason), f"{sizes}, {until}"
            n_exchanges += run.n_exchanges
    assert n_exchanges > 5


def test_a_source_ends_the_run_where_streams_move(mixture_of: Callable[..., DataConfig]) -> None:
    """Before the same row, also where that is in the first step of a phase: ranks look ahead on the streams that they have then."""
    config = mixture_of(STOP, mode="streamed", streams=N_STREAMS)
    endless = Run(config, [(SEQ_LEN, 12, 400)])
    endless.start(400, 1, [12])
    last = endless.step
    found = re.match(r"the source c has ended: row (\d+) of the run", endless.reason)
    assert found is not None, endless.reason
    lacking = int(found[1])
    assert last == lacking // 12 > 4
    for change in range(last - 2, last + 1):
        sizes = [(SEQ_LEN, 12, change), (SEQ_LEN, 24, 400)]
        expected, run = Run(config, sizes), Run(config, sizes)
        expected.start(400, 1, [12, 24])
        run.start(400, 2, [6, 4])
        assert (run.rows, run.state, run.reason) == (expected.rows, expected.state, endless.reason)
        assert sorted(run.rows) == list(range(12 * change + (lacking - 12 * change) // 24 * 24))
        assert run.n_exchanges == 1


def test_workers_change_nothing(mixture_of: Callable[..., DataConfig]) -> None:
    config = mixture_of(STOP, mode="streamed", streams=12)
    sizes = [(8, 4, 3), (16, 12, 2), (16, 6, 3)]
    expected, run = Run(config, sizes), Run(config, sizes)
    expected.start(8, 1, [4, 12, 6])
    for until, local, workers in ((4, [2, 3, 1], 2), (8, [1, 6, 3], 2)):
        run.start(until, 2, local, workers=workers)
    assert (run.rows, run.state) == (expected.rows, expected.state)
    assert run.n_exchanges == 2


@pytest.mark.parametrize("parts", [None, STOP], ids=["one source", "mixture"])
def test_without_the_exchange_no_row_is_given(
    parts: dict[str, Any] | None, tmp_path: Path, config_of: Callable[..., DataConfig], mixture_of: Callable[..., DataConfig]
) -> None:
    source = {"kind": "jsonl", "paths": [str(write_jsonl(tmp_path / "a.jsonl", TEXTS["a"]))]}
    config = config_of(source=source, mode="streamed") if parts is None else mixture_of(parts, mode="streamed")
    options = {"rows": 8, "earlier": [Phase(SEQ_LEN, 4, 2, 2)], "seq_len": SEQ_LEN}
    loaders = [loader_of(config, rank=rank, degree=2, local=4, **options) for rank in range(2)]
    for loader in loaders:
        next(loader)
        assert not loader.wants_merged_state
        next(loader)
        assert loader.wants_merged_state
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=r"from row 8 on, .*: join the state_dict\(\) of the loaders of all ranks by merge_states"
            ):
                next(loader)
        with pytest.raises(ValueError, match=r"lacks streams .* and so was not merged from all ranks"):
            loader.load_state_dict(loader.state_dict())
        if parts is not None:
            with pytest.raises(RuntimeError, match="from row 8 on"):
                loader.ended_for_all(lambda number: number)
    assert exchange(loaders)
    assert not exchange(loaders)
    expected, end = run_steps(config, None, steps=4, degree=1, local=8, **options)
    rows = {row: whole for loader in loaders for _ in range(2) for row, whole in content(next(loader))}
    assert rows == {row: expected[row] for row in range(8, 24)}
    assert merge_states([loader.state_dict() for loader in loaders]) == end


def test_streams_that_stay_are_not_exchanged(case: tuple[DataConfig, list[int]]) -> None:
    """Batches that are multiples of the same micro-batches give each rank the streams that it had."""
    config, lengths = case
    sizes = [(lengths[0], 4, 2), (lengths[-1], 12, 2), (lengths[-1], 8, 2)]
    expected, run = Run(config, sizes), Run(config, sizes)
    expected.start(6, 1, [1, 6, 2])
    run.start(6, 2, [2, 2, 2])
    assert (run.rows, run.state, run.n_exchanges) == (expected.rows, expected.state, 0)


def test_rows_are_shown(
    tmp_path: Path, config_of: Callable[..., DataConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ``titanarch data inspect``, as the ranks are fed them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS["a"])
    options = {"rows": 12, "local": 6, "earlier": [Phase(SEQ_LEN, 4, 2, 3), Phase(SEQ_LEN, 6, 3, 2)], "seq_len": SEQ_LEN}
    config = config_of(source={"kind": "jsonl", "paths": [str(path)]}, mode="streamed", packing="best_fit")
    loaders = [loader_of(config, rank=rank, degree=2, **options) for rank in range(2)]
    tokens: dict[int, Any] = {}
    for _ in range(7):
        exchange(loaders)
        for batch in map(next, loaders):
            tokens |= dict(zip(batch.row_B.tolist(), batch.tokens_BT, strict=True))
    debug_run = Path(__file__).parents[2] / "train_configs" / "debug.toml"
    phases = "[{steps = 3, seq_len = 16, global_batch_size = 4}, {steps = 2, seq_len = 16, global_batch_size = 6}]"
    arguments = ["--training.phases", phases, "--training.seq_len", "16", "--training.global_batch_size", "12"]
    arguments += ["--data.source", f'{{kind = "jsonl", paths = ["{path}"]}}', "--data.tokenizer", "bytes", "--data.limit_documents", "0"]
    arguments += ["--data.mode", "streamed", "--data.packing", "best_fit", "--debug.seed", "3", "--training.local_batch_size", "2"]
    tokenizer = BytesTokenizer(BytesConfig())
    for row in (11, 12, 23, 24, 40):
        assert main(["data", "inspect", "--config", str(debug_run), *arguments, "--row", str(row)]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert "".join(line for line in shown[1:] if not line.startswith("--- ")) == tokenizer.decode(tokens[row].numpy())
