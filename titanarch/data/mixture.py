"""Which source each row of a mixture takes.

Source s has the share w_s(x) of the rows at x, and is due W_s(n), the integral of w_s from 0 to n, of the first n rows. Its j-th row
may stand from where W_s = j to where W_s = j + 1. Rows are given out earliest deadline first, which meets every deadline since the
shares add up to 1 (Baruah et al., "Proportionate Progress", Algorithmica 15, 1996). So after any n rows each source is within one row
of what it is due.

In a run whose phases have rows of different lengths, what is given out is a window of the longest length, and is called a row here
all the same; ``phased_mixture`` makes shorter rows of them.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from titanarch.data.errors import data_error
from titanarch.data.phases import Phases
from titanarch.data.sources.mixture import weight_at

PLAN_CHUNK = 1024  # rows that are planned at once
PLAN_CHUNKS = 16  # chunks that a plan holds at once; another is made again from the state at its beginning

Knots = tuple[tuple[int, float], ...]
"""(row, weight) in order: linear between, constant after the last."""


@dataclass(frozen=True)
class Part:
    """A source as the order sees it. ``n_rows``: rows of a pass over it. ``dropped_at_end``: it has one pass and no more."""

    name: str
    knots: Knots
    n_rows: int
    dropped_at_end: bool


class _Share:
    """The share of one source from a row on: linear between ``rows``, constant after the last."""

    def __init__(self, rows: Sequence[float], shares: Sequence[float]) -> None:
        self._rows, self._shares = rows, shares
        self._due = [0.0]
        for i in range(1, len(rows)):
            self._due.append(self._due[-1] + (rows[i] - rows[i - 1]) * (shares[i - 1] + shares[i]) / 2)

    def due(self, row: float) -> float:
        """Rows that the source is due of those before ``row``."""
        i = bisect_right(self._rows, row) - 1
        share, more = self._shares[i], row - self._rows[i]
        slope = 0.0 if i + 1 == len(self._rows) else (self._shares[i + 1] - share) / (self._rows[i + 1] - self._rows[i])
        return self._due[i] + more * (share + slope * more / 2)

    def place(self, due: float) -> float:
        """Up to where the source is due no more than ``due`` rows; infinite where it never is."""
        i = bisect_right(self._due, due) - 1
        share, more = self._shares[i], due - self._due[i]
        slope = 0.0 if i + 1 == len(self._rows) else (self._shares[i + 1] - share) / (self._rows[i + 1] - self._rows[i])
        # share * x + slope * x^2 / 2 = more, solved in the form that loses no digits
        divisor = share + math.sqrt(max(0.0, share * share + 2 * slope * more))
        if more > 0:
            return self._rows[i] + 2 * more / divisor if divisor else math.inf
        return float(self._rows[i]) if share or slope else math.inf


class Rows(NamedTuple):
    """``source_N``: the source of each row. ``index_N``: which row of that source it is, from 0. Both int64 [N]."""

    source_N: np.ndarray
    index_N: np.ndarray


class MixtureOrder:
    """The rows of a run, in order. ``taken``: how many rows of each source are behind ``row``.

    Shares are those of the weights, which are normalised at each knot and where a source is dropped, and linear between. A source
    that is dropped leaves its share to the others from that row on. The last one is never dropped.

    ``phases``: of a run with rows of different lengths, None of another. Knots are rows of the run, whatever their length, and the
    rows given out, ``n_rows``, ``taken`` and the state count windows of the longest length.
    """

    def __init__(self, parts: Sequence[Part], phases: Phases | None = None) -> None:
        self.parts = list(parts)
        self._phases = phases
        self.row = 0
        self.taken = [0] * len(parts)
        self._active = list(range(len(parts)))
        self._begin_phase()

    def _begin_phase(self) -> None:
        """Shares of the sources that are left, from ``row`` on."""
        self._since, self._taken_then = self.row, list(self.taken)
        self._active = [i for i, part in enumerate(self.parts) if not (part.dropped_at_end and self.taken[i] >= part.n_rows)]
        self._compute_shares()

    def _compute_shares(self) -> None:
        active = [self.parts[i] for i in self._active]
        since = self._since if self._phases is None else self._phases.row_of(self._since)
        rows = [since, *sorted({row for part in self.parts for row, _ in part.knots if row > since})]
        sums = [sum(weight_at(part.knots, row) for part in active) for row in rows]
        if not all(sums):
            names = ", ".join(part.name for part in self.parts if part not in active)
            message = f"without {names}, dropped at row {since}, every weight is 0 at row {rows[sums.index(0)]}"
            raise data_error(f"{message}: give another source a weight there", key="data.source.sources")
        shares = {i: [weight_at(self.parts[i].knots, row) / total for row, total in zip(rows, sums, strict=True)] for i in self._active}
        self._shares = {i: self._share(rows, share) for i, share in shares.items()}
        own = {i: self.taken[i] - self._taken_then[i] for i in self._active}
        self._release = {i: self._shares[i].place(own[i]) for i in self._active}
        self._deadline = {i: self._shares[i].place(own[i] + 1) for i in self._active}

    def _share(self, rows: Sequence[int], shares: Sequence[float]) -> _Share:
        """``shares`` at ``rows`` of the run; linear in windows between these and the rows where the length changes."""
        if self._phases is None:
            return _Share(rows, shares)
        turns = (phase.first_row for phase in self._phases.parts if phase.first_row > rows[0])
        knots, all_rows = tuple(zip(rows, shares, strict=True)), sorted({*rows, *turns})
        return _Share([self._phases.windows_before(row) for row in all_rows], [weight_at(knots, row) for row in all_rows])

    def take(self, n_rows: int) -> Rows:
        """The next ``n_rows`` rows."""
        source_N, index_N = np.empty(n_rows, dtype=np.int64), np.empty(n_rows, dtype=np.int64)
        for n in range(n_rows):
            chosen = self._earliest()
            source_N[n], index_N[n] = chosen, self.taken[chosen]
            self.row += 1
            self.taken[chosen] += 1
            part = self.parts[chosen]
            if part.dropped_at_end and self.taken[chosen] == part.n_rows and len(self._active) > 1:
                self._begin_phase()
            else:
                self._release[chosen] = self._deadline[chosen]
                self._deadline[chosen] = self._shares[chosen].place(self.taken[chosen] - self._taken_then[chosen] + 1)
        return Rows(source_N, index_N)

    def due(self, end_row: float) -> list[float]:
        """Rows of each source among the first ``end_row``, to within a row for each source dropped; without taking them one by one."""
        order = MixtureOrder(self.parts, self._phases)
        while True:
            active = order._active
            left = {i: self.parts[i].n_rows - order._taken_then[i] for i in active if self.parts[i].dropped_at_end}
            dropped_at = {i: math.ceil(order._shares[i].place(n)) for i, n in left.items() if order._shares[i].due(end_row) > n}
            first = min(dropped_at, key=dropped_at.__getitem__) if dropped_at and len(active) > 1 else None
            row = end_row if first is None else dropped_at[first]
            due = [then + (order._shares[i].due(row) if i in active else 0.0) for i, then in enumerate(order._taken_then)]
            if first is None:
                return due
            order.row, order.taken = dropped_at[first], [round(n) for n in due]
            order.taken[first] = self.parts[first].n_rows
            order._begin_phase()

    def _earliest(self) -> int:
        chosen = -1
        for i in self._active:
            if self._release[i] < self.row + 1 and (chosen < 0 or self._deadline[i] < self._deadline[chosen]):
                chosen = i
        assert chosen >= 0, f"no source is due at row {self.row}"
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """JSON values: a few numbers a source."""
        return {"row": self.row, "taken": list(self.taken), "since": self._since, "taken_then": list(self._taken_then)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises DataError where it is of another number of sources."""
        if len(state["taken"]) != len(self.parts):
            message = f"the checkpoint is of a mixture of {len(state['taken'])} sources, the run of {len(self.parts)}"
            raise data_error(f"{message}: restore them, or start another run", key="data.source.sources")
        self.row, self.taken = state["since"], list(state["taken_then"])
        self._begin_phase()
        self.row, self.taken = state["row"], list(state["taken"])
        self._compute_shares()


class MixturePlan:
    """The rows of ``order`` by their numbers, from where it stands on: chunks of them, and the states at which chunks begin."""

    def __init__(self, order: MixtureOrder) -> None:
        self._order = order
        self.n_sources = len(order.parts)
        self.begin_at(order.state_dict())

    def begin_at(self, state: Mapping[str, Any]) -> None:
        """Begin at the row of ``state``, which an order gave."""
        self._order.load_state_dict(state)
        self._begin = self._order.row
        self._states = [self._order.state_dict()]
        self._chunks: dict[int, Rows] = {}

    def rows(self, first_row: int, n_rows: int) -> Rows:
        """Rows ``first_row`` to ``first_row + n_rows``."""
        source, index = [], []
        row, end = first_row, first_row + n_rows
        while row < end:
            number, place = self._chunk_of(row)
            chunk = self._chunk(number)
            source.append(chunk.source_N[place : place + end - row])
            index.append(chunk.index_N[place : place + end - row])
            row += len(source[-1])
        return Rows(np.concatenate(source), np.concatenate(index))

    def state(self, row: int) -> dict[str, Any]:
        """The state of the order at ``row``."""
        number, _ = self._chunk_of(row)
        if not self._begin + number * PLAN_CHUNK <= self._order.row <= row:
            self._go_to(number)
        self._order.take(row - self._order.row)
        return self._order.state_dict()

    def taken(self, row: int) -> list[float]:
        """Rows of each source among those before ``row``, whole numbers."""
        return list(self.state(row)["taken"])

    def _chunk_of(self, row: int) -> tuple[int, int]:
        assert row >= self._begin, f"row {row} lies before row {self._begin}, where the plan begins"
        return divmod(row - self._begin, PLAN_CHUNK)

    def _go_to(self, number: int) -> None:
        """Put the order at the beginning of a chunk."""
        while len(self._states) <= number:
            self._order.load_state_dict(self._states[-1])
            self._order.take(PLAN_CHUNK)
            self._states.append(self._order.state_dict())
        self._order.load_state_dict(self._states[number])

    def _chunk(self, number: int) -> Rows:
        if number not in self._chunks:
            if len(self._chunks) == PLAN_CHUNKS:
                del self._chunks[min(self._chunks)]
            self._go_to(number)
            self._chunks[number] = self._order.take(PLAN_CHUNK)
            if len(self._states) == number + 1:
                self._states.append(self._order.state_dict())
        return self._chunks[number]
