"""The ledger: every row once whatever is killed and resized, and whatever is wrong with it is found."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.data.common import data_config, exchange, loader_of, make_texts, write_jsonl
from titanarch.cli.main import main
from titanarch.data.config import DataConfig
from titanarch.data.errors import DataError
from titanarch.data.ledger import Ledger, LedgerHeader, Origins, file_of
from titanarch.data.ledger_check import LedgerReport, check_ledger
from titanarch.data.ledger_files import read_ledger
from titanarch.data.phases import Phase
from titanarch.data.row_loader import RowLoader, merge_states

ROWS = 8
PHASED = "phases"  # a mixture of packed documents through phases of shorter rows
MOVING = "streamed_phases"  # streams that ranks exchange
SHORTER = [(4, 16, 5), (8, 8, 5)]  # tokens of a row, rows of a step, steps of their phases before rows of 16 tokens


def configs(folder: Path) -> dict[str, DataConfig]:
    """Every kind of loader, over a few small documents."""
    one, two = (write_jsonl(folder / f"{name}.jsonl", make_texts(n, seed=n)) for name, n in (("one", 24), ("two", 30)))
    source = {"kind": "jsonl", "paths": [str(one)]}
    mixed = [{"source": source, "weight": 1.0}, {"source": {"kind": "jsonl", "paths": [str(two)]}, "name": "two", "weight": 2.0}]
    few_texts = write_jsonl(folder / "few.jsonl", make_texts(8, seed=8))
    few = {"source": {"kind": "jsonl", "paths": [str(few_texts)]}, "name": "few", "weight": 1.0}
    tables: dict[str, dict[str, Any]] = {
        "indexed": {"source": source},
        "best_fit": {"source": source, "packing": "best_fit"},
        "mixture": {"source": {"kind": "mixture", "sources": [{**mixed[0], "name": "one"}, mixed[1]]}},
        PHASED: {"source": {"kind": "mixture", "sources": [few, mixed[1]]}, "packing": "best_fit"},
        "streamed_mixture": {"source": {"kind": "mixture", "sources": [{**mixed[0], "name": "one"}, mixed[1]]}, "mode": "streamed"},
        MOVING: {"source": {"kind": "mixture", "sources": [{**mixed[0], "name": "one"}, mixed[1]]}, "mode": "streamed"},
        "streamed": {"source": source, "mode": "streamed"},
        "streamed_best_fit": {"source": source, "mode": "streamed", "packing": "best_fit"},
        "streamed_padded": {"source": source, "mode": "streamed", "packing": "padded", "shuffle_documents": 5, "streams": 16},
    }
    return {name: data_config(folder / "cache", **table) for name, table in tables.items()}


class Run:
    """What a trainer does with loaders, ledgers and checkpoints, without a model; ``step``: of the newest checkpoint."""

    def __init__(self, folder: Path, config: DataConfig, phases: Sequence[tuple[int, int, int]] = ()) -> None:
        self.folder, self.config, self.phases = folder, config, phases
        self.number, self.step, self.state = 0, 0, None

    def start(self, draw: random.Random, *, workers: int = 0, steps: int | None = None) -> None:
        """One start on a drawn layout, that saves now and then and is killed between two lines; ``steps``: ends well after so many."""
        self.number += 1
        degree, local = draw.choice([(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
        loaders = [self._loader(local, rank, degree, workers) for rank in range(degree)]
        ledgers = [self._ledger(loader, rank, degree, local, workers) for rank, loader in enumerate(loaders)]
        last, step = self.step + (steps or draw.randint(1, 9)), self.step
        while step < last:
            step += 1
            exchange(loaders)
            for loader, ledger in zip(loaders, ledgers, strict=True):
                ledger.step(step, [next(loader) for _ in range(loader.accumulation_steps)], made=True)
            if draw.random() < 0.3 or (steps and step == last):
                self.step, self.state = step, merge_states([loader.state_dict() for loader in loaders])
        if not steps:
            alive = draw.randint(0, degree - 1)
            exchange(loaders)
            for rank, (loader, ledger) in enumerate(zip(loaders, ledgers, strict=True)):
                if rank < alive:
                    ledger.step(step + 1, [next(loader) for _ in range(loader.accumulation_steps)], made=True)
                elif rank == alive:
                    with ledger.path.open("ab") as file:
                        file.write(b'{"step":99,"made":tr')
        for each in (*loaders, *ledgers):
            each.close()

    def _loader(self, local: int, rank: int, degree: int, workers: int) -> RowLoader:
        config = self.config.model_copy(update={"workers": workers})
        earlier = [Phase(seq_len, rows, local, steps) for seq_len, rows, steps in self.phases]
        loader = loader_of(config, rows=ROWS, local=local, rank=rank, degree=degree, earlier=earlier)
        if self.state is not None:
            loader.load_state_dict(json.loads(json.dumps(self.state)))
        return loader

    def _ledger(self, loader: RowLoader, rank: int, degree: int, local: int, workers: int) -> Ledger:
        header = LedgerHeader(
            start=self.number, after_step=self.step, process=rank, n_processes=degree, data_rank=rank, data_parallel=degree,
            micro_batch=local, workers=workers, origins=loader.origins,
        )  # fmt: skip
        return Ledger(self.folder, header)


def report_of(folder: Path) -> LedgerReport:
    return check_ledger(read_ledger(folder))


STREAMED = ["streamed", "streamed_best_fit", "streamed_padded", "streamed_mixture"]


@pytest.mark.parametrize("name", ["indexed", "best_fit", "mixture", PHASED, MOVING, *STREAMED])
def test_every_row_once_over_kills_and_resizes(tmp_path: Path, name: str) -> None:
    draw = random.Random(name)
    run = Run(tmp_path, configs(tmp_path)[name], SHORTER if name in (PHASED, MOVING) else ())
    while run.number < 12 or run.step < 30:
        run.start(draw)
    run.start(draw, workers=2 if name in ("indexed", "streamed", "streamed_mixture") else 0, steps=3)
    report = report_of(tmp_path)
    assert report.problems == ()
    n_rows = run.step * ROWS + sum((rows - ROWS) * steps for _, rows, steps in run.phases)
    assert (report.n_lost, report.n_doubled, report.n_steps, report.n_rows) == (0, 0, run.step, n_rows)
    assert report.n_again > 5
    assert any("epoch 1" in line for line in report.passes), "more than one pass was made"
    if name == "indexed":
        n_windows = report.passes[0].split()[-2]
        assert report.passes[0] == f"the data, epoch 0: {n_windows} of {n_windows} windows"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two starts, the second of which goes on after the first."""
    folders = {}
    for name, config in configs(tmp_path_factory.mktemp("data")).items():
        run = Run(tmp_path_factory.mktemp(name), config, SHORTER if name in (PHASED, MOVING) else ())
        for steps in (12, 12):
            run.start(random.Random(1), steps=steps)
        folders[name] = run.folder
    return folders


def changed(recorded: Path, folder: Path, start: int, change: Callable[[list[dict[str, Any]]], None]) -> LedgerReport:
    """The report once ``change`` was made to the records of every process of a start."""
    for source in sorted(recorded.glob("ledger/*/*.jsonl")):
        target = folder / source.relative_to(recorded)
        target.parent.mkdir(parents=True, exist_ok=True)
        records = [json.loads(line) for line in source.read_text().splitlines()]
        if records[0]["start"] == start:
            change(records)
        target.write_text("".join(json.dumps(record) + "\n" for record in records))
    return report_of(folder)


def drop_step(records: list[dict[str, Any]]) -> None:
    del records[5]


def repeat_step(records: list[dict[str, Any]]) -> None:
    records[6]["rows"] = records[5]["rows"]


def later_window(records: list[dict[str, Any]]) -> None:
    records[6]["rows"][0][1:] = records[5]["rows"][0][1:]


def of_few(record: dict[str, Any]) -> list[int]:
    """The first row of the source 0 in a step."""
    return next(row for row in record["rows"] if row[1] == 0)


def another_part(records: list[dict[str, Any]]) -> None:
    of_few(records[2])[4] ^= 1


def part_that_is_none(records: list[dict[str, Any]]) -> None:
    of_few(records[2])[4:6] = [0, 3]
    of_few(records[3])[4] = 4
    of_few(records[4])[3] = 10**12
    of_few(records[5])[1] = -1


def begins_late(records: list[dict[str, Any]]) -> None:
    records[0]["after_step"] = 14
    del records[1:3]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("indexed", drop_step, ["step 6 follows step 4", "rows lost: row 32, row 33"]),
        ("indexed", repeat_step, ["rows used more than once: row 32 2 times", "rows lost: row 40"]),
        ("indexed", later_window, ["the data, epoch 0: windows used more than once: "]),
        ("mixture", later_window, [", epoch 0: windows used more than once: "]),
        (PHASED, repeat_step, ["rows used more than once: row 64 2 times", "of 4), "]),
        (PHASED, another_part, ["few, epoch 0: windows used more than once: ", "few, epoch 0: windows lost: "]),
        (
            PHASED,
            part_that_is_none,
            ["rows that are not of the data: row ", "n_parts 3, ", "part 4 ", " window 1000000000000 ", "source -1 "],
        ),
        ("streamed", drop_step, ["rows lost: row 32", "streams that do not go on where they stood: row 40 begins at pass 0, document "]),
        ("streamed_mixture", drop_step, ["rows lost: row 32", "streams that do not go on where they stood: row 4"]),
        ("streamed_padded", later_window, ["streams that do not go on where they stood: row "]),
    ],
)
def test_what_is_wrong_is_named(recorded: dict[str, Path], tmp_path: Path, name: str, change: Any, said: list[str]) -> None:
    report = changed(recorded[name], tmp_path, 1, change)
    for text in said:
        assert any(text in problem for problem in report.problems), report.problems
    assert report.n_lost + report.n_doubled > 0
    if change is another_part:
        assert (report.n_lost, report.n_doubled) == (1, 1)
    assert main(["data", "ledger", str(tmp_path)]) == 1


def test_a_start_without_a_ledger_leaves_steps_that_are_not_recorded(recorded: dict[str, Path], tmp_path: Path) -> None:
    report = changed(recorded["indexed"], tmp_path, 2, begins_late)
    assert report.problems[0] == "steps 13 to 14 were not recorded: data.ledger was off, or files are gone"
    assert (report.n_unrecorded, report.n_lost) == (2, 0)


def test_a_row_that_was_another_at_an_earlier_start_is_named(recorded: dict[str, Path], tmp_path: Path) -> None:
    def again(records: list[dict[str, Any]]) -> None:
        records[0]["after_step"] = 10
        for record, step in zip(records[1:], range(11, 99), strict=False):
            record["step"] = step
            for row in record["rows"]:
                row[0] -= 2 * ROWS

    report = changed(recorded["indexed"], tmp_path, 2, again)
    assert any(
        problem.startswith("rows that were others when they were made again: row 80 (source 0 epoch ") for problem in report.problems
    )


def test_roll_backs_and_skipped_updates_are_counted(recorded: dict[str, Path], tmp_path: Path) -> None:
    def rolled_back(records: list[dict[str, Any]]) -> None:
        records[3]["made"] = False
        records.insert(11, {"rolled_back_to": 8})  # steps 9 and 10 are skipped; what were 11 and 12 are 9 and 10 now
        for record in records[12:]:
            record["step"] -= 2

    def goes_on(records: list[dict[str, Any]]) -> None:
        records[0]["after_step"] = 10
        for record in records[1:]:
            record["step"] -= 2

    changed(recorded["streamed"], tmp_path / "one", 1, rolled_back)
    report = changed(tmp_path / "one", tmp_path / "two", 2, goes_on)
    assert report.problems == ()
    assert (report.n_steps, report.n_skipped, report.n_not_made, report.n_lost) == (22, 16, 8, 0)
    # A resume at the checkpoint that the run went back to meets the bad rows again.
    report = changed(tmp_path / "one", tmp_path / "three", 2, lambda records: records[0].update(after_step=8))
    assert report.n_skipped == 0
    assert any("rows lost: row 64" in problem for problem in report.problems)


def test_damage_is_named_and_a_torn_line_is_not(recorded: dict[str, Path], tmp_path: Path) -> None:
    changed(recorded["indexed"], tmp_path, 0, drop_step)
    path = file_of(tmp_path, 2, 0)
    whole = path.read_bytes()
    for cut in (1, 60, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        assert report_of(tmp_path).problems == ()
    for damage, said in (
        (whole.replace(b'"step": 15', b'"step: 15'), r"process-00000.jsonl:4: is damaged"),
        (whole.replace(b'"ledger": 2', b'"ledger": 7'), "its version is 7"),
        (whole.replace(b'"n_parts": 1', b'"n_parts": 0'), "the header is damaged: windows of 0 parts"),
        (whole.replace(b'"micro_batch"', b'"macro_batch"'), "the header is damaged"),
        (whole.replace(b'"rows": [[96, ', b'"rows": [[', 1), "start 2, process 0, step 13: the rows are damaged"),
        (b"\x80\x04cos\nsystem\n", "process-00000.jsonl:1: is "),
    ):
        assert damage != whole
        path.write_bytes(damage)
        with pytest.raises(DataError, match=said):
            report_of(tmp_path)


def test_a_pass_that_has_its_rows_but_not_its_parts(tmp_path: Path) -> None:
    """The second half of a window is lost where the first one was used twice, though no later pass has begun; thirds are no halves."""
    origins = Origins(windows={"": 2}, n_parts=6)
    header = LedgerHeader(
        start=1, after_step=0, process=0, n_processes=1, data_rank=0, data_parallel=1, micro_batch=5, workers=0, origins=origins
    )
    Ledger(tmp_path, header).close()
    rows = [[0, 0, 0, 0, 0, 2, 7], [1, 0, 0, 0, 0, 2, 7], *([2 + part, 0, 0, 1, part, 3, 7] for part in range(3))]
    with file_of(tmp_path, 1, 0).open("a") as file:
        file.write(json.dumps({"step": 1, "made": True, "rows": rows}) + "\n")
    report = report_of(tmp_path)
    assert report.problems == (
        "the data, epoch 0: windows used more than once: 0 (part 0 of 6), 0 (part 1 of 6), 0 (part 2 of 6)",
        "the data, epoch 0: windows lost: 0 (part 3 of 6), 0 (part 4 of 6), 0 (part 5 of 6)",
    )
    assert (report.n_lost, report.n_doubled) == (1, 1)
    assert report.passes == ("the data, epoch 0: 1 of 2 windows and parts of 1 more",)


@pytest.mark.parametrize("starts", [(1,), (1, 2)])
def test_ledgers_of_version_1_are_read(recorded: dict[str, Path], tmp_path: Path, starts: tuple[int, ...]) -> None:
    """A run that an older version began, and one that it made whole."""

    def older(records: list[dict[str, Any]]) -> None:
        records[0]["ledger"] = 1
        del records[0]["n_parts"]

    folder = recorded["mixture"]
    expected = report_of(folder)
    for start in starts:
        report = changed(folder, tmp_path / str(start), start, older)
        folder = tmp_path / str(start)
        assert report == expected
    assert expected.problems == ()


def test_no_ledger_and_no_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "ledger", str(tmp_path)]) == 2
    assert "holds no ledger of rows: train with data.ledger = true" in capsys.readouterr().err
    (tmp_path / "ledger").write_text("")
    run = Run(tmp_path, configs(tmp_path)["indexed"])
    with pytest.raises(DataError, match=r"the ledger of rows cannot be written.*data\.ledger = false"):
        run.start(random.Random(1))
