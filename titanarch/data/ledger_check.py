"""Whether a run used every row once, from its ledger.

Shapes: N rows, I numbers of a row, W windows of a source, U parts of a window.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from titanarch.data.ledger import Origins
from titanarch.data.ledger_files import Lineage, StepRows

_SHOWN = 10


@dataclass(frozen=True)
class LedgerReport:
    """What a ledger says. ``n_lost``, ``n_doubled``: rows. ``n_skipped``: rows of steps that the run went back from.

    ``n_not_made``: rows of steps whose update was skipped. ``n_again``: steps that a later start made again, after a stop.
    ``n_unrecorded``: steps without a record. ``passes``: a line for each pass over each source. ``problems``: what is wrong, by name.
    """

    n_starts: int
    n_steps: int
    n_rows: int
    n_again: int
    n_lost: int
    n_doubled: int
    n_skipped: int
    n_not_made: int
    n_unrecorded: int
    passes: tuple[str, ...]
    problems: tuple[str, ...]


def check_ledger(lineage: Lineage) -> LedgerReport:
    """Every row once: by number, by what it is, and the same whenever it was read again."""
    n_columns = len(lineage.origins.columns) + 2
    steps = [lineage.steps[step] for step in sorted(lineage.steps)]
    skipped = [rows for _, rows in lineage.skipped]
    rows_NI = _joined([*steps, *skipped], n_columns)
    found = _Found(list(lineage.problems))
    found.problems += [
        f"steps {first} to {last} were not recorded: data.ledger was off, or files are gone" for first, last in lineage.missing
    ]
    found.order(steps)
    found.numbers(rows_NI, _unrecorded(lineage))
    found.same(rows_NI, _joined(lineage.again, n_columns), lineage.origins.columns)
    gaps = bool(lineage.missing)
    if lineage.origins.n_streams and lineage.origins.windows:
        passes = []
        for source, name in enumerate(lineage.origins.windows):
            own_NI = np.delete(rows_NI[rows_NI[:, 1] == source], 1, axis=1)
            passes += [f"{name}, {line}" for line in found.streams(own_NI, lineage.origins.n_streams, gaps=gaps)]
    elif lineage.origins.n_streams:
        passes = list(found.streams(rows_NI, lineage.origins.n_streams, gaps=gaps))
    else:
        passes = list(found.windows(rows_NI, lineage.origins, gaps=gaps))
    return LedgerReport(
        n_starts=len(lineage.starts),
        n_steps=len(steps),
        n_rows=sum(len(each.rows_NI) for each in steps),
        n_again=len({(each.start, each.step) for each in lineage.again}),
        n_lost=max(found.lost.values()),
        n_doubled=max(found.doubled.values()),
        n_skipped=sum(len(each.rows_NI) for each in skipped),
        n_not_made=sum(len(each.rows_NI) for each in steps if not each.made),
        n_unrecorded=sum(last - first + 1 for first, last in lineage.missing),
        passes=tuple(passes),
        problems=tuple(found.problems),
    )


def _joined(steps: Sequence[StepRows], n_columns: int) -> np.ndarray:
    """The rows of all steps by number, int64 [N, I]."""
    rows_NI = np.concatenate([np.empty((0, n_columns), dtype=np.int64), *(each.rows_NI for each in steps)])
    return rows_NI[np.argsort(rows_NI[:, 0], kind="stable")]


def _unrecorded(lineage: Lineage) -> list[tuple[int, int]]:
    """Rows (first, after the last) of steps that nothing was recorded of, as the steps around them tell."""
    intervals = []
    for first, last in lineage.missing:
        before, after = lineage.steps.get(first - 1), lineage.steps.get(last + 1)
        begin = 0 if before is None else int(before.rows_NI[-1, 0]) + 1
        end = np.iinfo(np.int64).max if after is None else int(after.rows_NI[0, 0])
        intervals.append((begin, end))
    return intervals


class _Found:
    """Problems, and how many rows each way of looking finds lost or doubled; several may find the same row."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        self.lost = {"number": 0, "origin": 0}
        self.doubled = {"number": 0, "origin": 0}

    def _tell(self, what: str, items: Sequence[str]) -> None:
        if items:
            more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
            self.problems.append(f"{what}: {', '.join(items[:_SHOWN])}{more}")

    def order(self, steps: Sequence[StepRows]) -> None:
        """The rows of a step are consecutive, and come after those of the step before."""
        end = 0
        broken = []
        for each in steps:
            number_N = each.rows_NI[:, 0]
            if len(number_N) == 0 or int(number_N[0]) < end or int(number_N[-1]) - int(number_N[0]) != len(number_N) - 1:
                broken.append(f"step {each.step} of start {each.start}")
            end = max(end, int(number_N[-1]) + 1 if len(number_N) else end)
        self._tell("rows that are not the next ones", broken)

    def numbers(self, rows_NI: np.ndarray, unrecorded: Sequence[tuple[int, int]]) -> None:
        """Every number from 0 on once."""
        number_U, count_U = np.unique(rows_NI[:, 0], return_counts=True)
        doubled = [f"row {number} {count} times" for number, count in zip(number_U[count_U > 1], count_U[count_U > 1], strict=True)]
        self.doubled["number"] += int((count_U - 1).sum())
        self._tell("rows used more than once", doubled)
        ends = np.concatenate([[-1], number_U])
        holes = [(a + 1, b) for a, b in pairwise(ends.tolist()) if b > a + 1]
        lost = [number for first, end in holes for number in range(first, end) if not any(a <= number < b for a, b in unrecorded)]
        self.lost["number"] += len(lost)
        self._tell("rows lost", [f"row {number}" for number in lost])

    def same(self, rows_NI: np.ndarray, again_NI: np.ndarray, columns: Sequence[str]) -> None:
        """A row that was read again was the same row, with the same content."""
        place_N = np.searchsorted(rows_NI[:, 0], again_NI[:, 0])
        inside_N = place_N < len(rows_NI)
        again_NI, now_NI = again_NI[inside_N], rows_NI[place_N[inside_N]]
        differs_N = (now_NI[:, 0] == again_NI[:, 0]) & (now_NI != again_NI).any(axis=1)
        self._tell(
            "rows that were others when they were made again",
            [
                f"row {now[0]} ({_origin(then, columns)}, then {_origin(now, columns)})"
                for then, now in zip(again_NI[differs_N], now_NI[differs_N], strict=True)
            ],
        )

    def windows(self, rows_NI: np.ndarray, origins: Origins, *, gaps: bool) -> Iterator[str]:
        """Each window, or each part of it, of each pass over a source once; all of them where a later pass has begun."""
        n_U = origins.n_parts
        is_row_N = _in_data(rows_NI, origins)
        strange_NI, rows_NI = rows_NI[~is_row_N], rows_NI[is_row_N]
        self._tell("rows that are not of the data", [f"row {row[0]} ({_origin(row, origins.columns)})" for row in strange_NI])
        for source, (name, n_windows) in enumerate(origins.windows.items()):
            own_NI = rows_NI[rows_NI[:, 1] == source]
            last = int(own_NI[:, 2].max()) if len(own_NI) else -1
            for epoch in range(last + 1):
                count_WU, rows_W = _uses(own_NI[own_NI[:, 2] == epoch], n_windows, n_U)
                where = f"{name or 'the data'}, epoch {epoch}"
                doubled_WU = count_WU > 1
                self.doubled["origin"] += _n_rows((count_WU - 1) * doubled_WU, rows_W)
                self._tell(f"{where}: windows used more than once", _named(doubled_WU))
                if (epoch < last or count_WU.sum() >= count_WU.size) and not gaps:
                    self.lost["origin"] += _n_rows(count_WU == 0, rows_W)
                    self._tell(f"{where}: windows lost", _named(count_WU == 0))
                n_begun, n_whole = int((count_WU > 0).any(axis=1).sum()), int((count_WU > 0).all(axis=1).sum())
                partly = f" and parts of {n_begun - n_whole} more" if n_begun > n_whole else ""
                yield f"{where}: {n_whole} of {n_windows} windows{partly}"

    def streams(self, rows_NI: np.ndarray, n_streams: int, *, gaps: bool) -> Iterator[str]:
        """Each row of a stream begins where the row before it in the stream ended, and the first at the beginning."""
        breaks = []
        for stream in range(n_streams):
            own_NI = rows_NI[rows_NI[:, 0] % n_streams == stream]
            begin_N3, end_N3 = own_NI[:, 1:4], np.concatenate([np.zeros((1, 3), dtype=np.int64), own_NI[:-1, 4:7]])
            for i in np.flatnonzero((begin_N3 != end_N3).any(axis=1)) if len(own_NI) else ():
                if not gaps:
                    is_earlier = begin_N3[i].tolist() < end_N3[i].tolist()
                    (self.doubled if is_earlier else self.lost)["origin"] += 1
                    breaks.append(f"row {own_NI[i, 0]} begins at {_place(begin_N3[i])}, the row before it ended at {_place(end_N3[i])}")
        self._tell("streams that do not go on where they stood", breaks)
        for epoch in np.unique(rows_NI[:, 1]).tolist():
            own_NI = rows_NI[rows_NI[:, 1] == epoch]
            n_documents = len(np.unique(own_NI[:, 2]))
            yield f"epoch {epoch}: {len(own_NI)} rows, {n_documents} documents, or groups packed together, begun or gone on with"


def _in_data(rows_NI: np.ndarray, origins: Origins) -> np.ndarray:
    """Whether there is a source, epoch, window and part of these numbers, bool [N]."""
    source_N, epoch_N, window_N = rows_NI[:, 1:4].T
    known_N = (source_N >= 0) & (source_N < len(origins.windows))
    n_windows_N = np.array([*origins.windows.values(), 0])[np.where(known_N, source_N, -1)]
    in_N = known_N & (epoch_N >= 0) & (window_N >= 0) & (window_N < n_windows_N)
    if origins.n_parts > 1:
        part_N, n_parts_N = rows_NI[:, 4:6].T
        in_N &= (part_N >= 0) & (part_N < n_parts_N) & (origins.n_parts % np.maximum(n_parts_N, 1) == 0)
    return in_N


def _uses(rows_NI: np.ndarray, n_windows: int, n_parts: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each part of each window is used, int64 [W, U], and the rows that the window is cut into, int64 [W]."""
    window_N = rows_NI[:, 3]
    part_N, cut_N = rows_NI[:, 4:6].T if n_parts > 1 else (np.zeros_like(window_N), np.ones_like(window_N))
    size_N = n_parts // cut_N
    first_N = window_N * n_parts + part_N * size_N
    edges = np.bincount(first_N, minlength=n_windows * n_parts + 1) - np.bincount(first_N + size_N, minlength=n_windows * n_parts + 1)
    rows_W = np.ones(n_windows, dtype=np.int64)
    np.maximum.at(rows_W, window_N, cut_N)
    return edges.cumsum()[:-1].reshape(n_windows, n_parts), rows_W


def _n_rows(count_WU: np.ndarray, rows_W: np.ndarray) -> int:
    """How many rows of their windows ``count_WU`` uses are, at least one where there are any."""
    return int((-(-count_WU.sum(axis=1) * rows_W // count_WU.shape[1])).sum())


def _named(is_WU: np.ndarray) -> list[str]:
    """The windows, or their parts, that ``is_WU`` marks."""
    n_parts = is_WU.shape[1]
    return [str(window) if n_parts == 1 else f"{window} (part {part} of {n_parts})" for window, part in np.argwhere(is_WU).tolist()]


def _origin(row: np.ndarray, columns: Sequence[str]) -> str:
    numbers = " ".join(f"{name} {number}" for name, number in zip(columns, row[1:-1].tolist(), strict=True))
    return f"{numbers}, checksum {int(row[-1]):08x}"


def _place(place: np.ndarray) -> str:
    epoch, document, token = place.tolist()
    return f"pass {epoch}, document {document}, token {token}"
