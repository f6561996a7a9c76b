"""Reading the ledger of a run: what each start recorded, and the rows of the steps that count.

Starts are taken in order. One that went on after step c supersedes what earlier ones recorded of later steps; going back to the
checkpoint of step c turns the rows of later steps into skipped ones. A step counts where every process of its start recorded it.

Shapes: N rows, I numbers of a row: its number in the run, its origin, its checksum.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from titanarch.data.errors import data_error
from titanarch.data.ledger import FOLDER, READABLE, VERSION, LedgerHeader, Origins


@dataclass(frozen=True)
class StepRows:
    """The rows of a step over all processes, int64 [N, I], in order of their numbers; ``start``: which one made it."""

    start: int
    step: int
    made: bool
    rows_NI: np.ndarray


@dataclass
class Lineage:
    """What the ledger says of a run.

    ``steps``: those that count, by number. ``skipped``: steps of before a roll-back, with the step of the checkpoint it went to.
    ``again``: steps that a later start made again. ``missing``: intervals (first, last) of steps that nothing was recorded of.
    ``problems``: what contradicts itself.
    """

    origins: Origins
    starts: list[LedgerHeader] = field(default_factory=list)
    steps: dict[int, StepRows] = field(default_factory=dict)
    skipped: list[tuple[int, StepRows]] = field(default_factory=list)
    again: list[StepRows] = field(default_factory=list)
    missing: list[tuple[int, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_ledger(run_folder: Path) -> Lineage:
    """Raises DataError where there is no ledger, or a file of it is damaged or of a newer version."""
    folders = sorted((run_folder / FOLDER).glob("start-*"))
    starts = [start for start in (_read_start(folder) for folder in folders) if start]
    if not starts:
        raise data_error("holds no ledger of rows: train with data.ledger = true", file=run_folder, key="data.ledger")
    lineage = Lineage(starts[0][0][0].origins)
    for files in starts:
        _follow(lineage, files)
    return lineage


_File = tuple[LedgerHeader, list[dict[str, Any]]]


def _read_start(folder: Path) -> list[_File]:
    """The files of a start that have a header; none where it was killed before."""
    files = (_read_file(path) for path in sorted(folder.glob("process-*.jsonl")))
    return [file for file in files if file is not None]


def _read_file(path: Path) -> _File | None:
    """A last line without its end is what a kill left of it, and is dropped."""
    lines = path.read_bytes().split(b"\n")[:-1]
    if not lines:
        return None
    records = [_record(line, path, number) for number, line in enumerate(lines, 1)]
    return _header(records[0], path), records[1:]


def _record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise data_error(f"is damaged: {error}; restore it from a copy", file=path, line=number) from error
    if not isinstance(record, dict) or not record.keys() & {"ledger", "step", "rolled_back_to"}:
        raise data_error("is no line of a ledger; restore it from a copy", file=path, line=number)
    return record


def _header(record: Mapping[str, Any], path: Path) -> LedgerHeader:
    version = record.get("ledger")
    if version not in READABLE:
        message = f"the first line is no header of version {VERSION} of the ledger or an earlier one: its version is {version!r}"
        raise data_error(f"{message}; a newer titanarch reads newer ones", file=path, line=1)
    of_origins = [each.name for each in fields(Origins)]
    own = {name: value for name, value in record.items() if name not in ("ledger", *of_origins)}
    try:
        n_parts = 1 if version == 1 else int(record["n_parts"])
        if n_parts < 1:
            raise ValueError(f"windows of {n_parts} parts")
        return LedgerHeader(**own, origins=Origins(record["windows"], record["n_streams"], n_parts))
    except (TypeError, KeyError, ValueError) as error:
        raise data_error(f"the header is damaged: {error}; restore it from a copy", file=path, line=1) from error


def _follow(lineage: Lineage, files: list[_File]) -> None:
    """Add a start to what the starts before it left."""
    header = files[0][0]
    lineage.starts.append(header)
    if header.origins != lineage.origins:
        lineage.problems.append(f"start {header.start} read other data: {header.origins}, not {lineage.origins}")
    after = header.after_step
    lineage.again += [lineage.steps.pop(step) for step in sorted(lineage.steps) if step > after]
    lineage.again += [rows for mark, rows in lineage.skipped if mark >= after]
    lineage.skipped = [(mark, rows) for mark, rows in lineage.skipped if mark < after]
    lineage.missing = [(first, min(last, after)) for first, last in lineage.missing if first <= after]
    known = max((*lineage.steps, *(last for _, last in lineage.missing)), default=0)
    if known < after:
        lineage.missing.append((known + 1, after))
    n_whole = min(len(records) for _, records in files) if len(files) == header.n_processes else 0
    for i in range(n_whole):
        _add(lineage, [(own, records[i]) for own, records in files])


def _add(lineage: Lineage, said: list[tuple[LedgerHeader, dict[str, Any]]]) -> None:
    """What all processes recorded as their next line."""
    header, first = said[0]
    where = f"start {header.start}"
    if len({(record.get("step"), record.get("made"), record.get("rolled_back_to")) for _, record in said}) > 1:
        lineage.problems.append(f"{where}: its processes recorded different steps where the first has {_named(first)}")
        return
    if "rolled_back_to" in first:
        mark = first["rolled_back_to"]
        lineage.skipped += [(mark, lineage.steps.pop(step)) for step in sorted(lineage.steps) if step > mark]
        return
    step = first["step"]
    expected = max((*lineage.steps, *(last for _, last in lineage.missing), header.after_step)) + 1
    if step != expected:
        lineage.problems.append(f"{where}: step {step} follows step {expected - 1}")
    rows_NI = np.concatenate([_rows(own, record, lineage) for own, record in _by_data_rank(lineage, said)])
    lineage.steps[step] = StepRows(header.start, step, first["made"], rows_NI[np.argsort(rows_NI[:, 0], kind="stable")])


def _named(record: Mapping[str, Any]) -> str:
    return f"step {record['step']}" if "step" in record else f"a roll-back to step {record['rolled_back_to']}"


def _by_data_rank(lineage: Lineage, said: list[tuple[LedgerHeader, dict[str, Any]]]) -> Iterator[tuple[LedgerHeader, dict[str, Any]]]:
    """One process of each data rank; those that should have been fed the same rows are compared."""
    first: dict[int, tuple[LedgerHeader, dict[str, Any]]] = {}
    for header, record in said:
        other, kept = first.setdefault(header.data_rank, (header, record))
        if kept["rows"] != record["rows"]:
            what = f"processes {other.process} and {header.process} share a data rank, and step {record['step']} had other rows on each"
            lineage.problems.append(f"start {header.start}: {what}")
    if len(first) != said[0][0].data_parallel:
        lineage.problems.append(f"start {said[0][0].start}: rows of {len(first)} of {said[0][0].data_parallel} data ranks are there")
    yield from (first[rank] for rank in sorted(first))


def _rows(header: LedgerHeader, record: Mapping[str, Any], lineage: Lineage) -> np.ndarray:
    n_columns = len(lineage.origins.columns) + 2
    try:
        return np.array(record["rows"], dtype=np.int64).reshape(-1, n_columns)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        place = f"start {header.start}, process {header.process}, step {record.get('step')}"
        raise data_error(f"{place}: the rows are damaged: {error}; restore the ledger from a copy") from error
