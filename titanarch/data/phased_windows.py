"""Which windows of a corpus the rows of a run are, where its phases have rows of different lengths.

The corpus is cut into W windows of the run's longest length L, in a new order each epoch. A phase of rows of L / n tokens takes
windows in that order as any phase does, so that none is used twice in an epoch or left out between phases, and cuts each
into n parts, which are its rows: the first parts of all of its windows, then the second ones, and so on, so that a step
seldom has two parts of a window. A phase that goes on into another epoch ends the parts of one before it begins the next.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from titanarch.data.phases import Phase, Phases

ENDLESS = 1 << 62


class Span(NamedTuple):
    """``n_rows`` rows in order: each part ``part`` of ``n_parts`` of a window, those from ``place`` on in the order of the run."""

    place: int
    part: int
    n_parts: int
    n_rows: int


class PhasedWindows:
    """The windows of the rows of ``phases`` over ``n_windows`` windows a pass.

    The lengths of all phases divide the longest, and the rows of each phase but the last fill whole windows: see ``problems``.
    """

    def __init__(self, phases: Phases, n_windows: int) -> None:
        assert not problems(phases), "the configuration refuses it"
        self._phases, self._n_windows = phases, n_windows
        parts = [phases.longest // phase.seq_len for phase in phases.parts]
        sizes = [_n_rows(phase) // n for phase, n in zip(phases.parts, parts, strict=True)]
        firsts = [0, *accumulate(sizes[:-1])]
        self._of = dict(zip(phases.parts, zip(firsts, sizes, parts, strict=True), strict=True))
        """The first place of each phase in the order of the run, how many windows it has, and the parts of each."""

    def spans(self, first_row: int, n_rows: int) -> list[Span]:
        """Rows ``first_row`` to ``first_row + n_rows``."""
        spans, row, end = [], first_row, first_row + n_rows
        while row < end:
            span = self._span(row, end - row)
            spans.append(span)
            row += span.n_rows
        return spans

    def windows_before(self, row: int) -> float:
        """How many windows the rows before ``row`` are, in tokens."""
        phase = self._phases.at_row(row)
        first, _, n_parts = self._of[phase]
        return first + (row - phase.first_row) / n_parts

    def _span(self, row: int, most: int) -> Span:
        """The rows from ``row`` on that follow each other, at most ``most``."""
        phase = self._phases.at_row(row)
        (first, n, n_parts), W = self._of[phase], self._n_windows
        index, size = row - phase.first_row, min(n, W - first % W)  # of the epoch in which the phase begins
        if index >= size * n_parts:
            n_epochs, index = divmod(index - size * n_parts, W * n_parts)
            n -= size + n_epochs * W
            first += size + n_epochs * W
            size = min(W, n)
        part, place = divmod(index, size)
        return Span(first + place, part, n_parts, min(most, size - place))


def _n_rows(phase: Phase) -> int:
    return ENDLESS if phase.n_steps is None else phase.n_steps * phase.global_batch_size


def problems(phases: Phases) -> Sequence[tuple[int, str]]:
    """Why rows of these lengths cannot be cut from windows of the longest: the number of a phase, and the reason."""
    found = []
    for number, phase in enumerate(phases.parts):
        n_parts, rest = divmod(phases.longest, phase.seq_len)
        if rest:
            found.append((number, f"rows of {phase.seq_len} tokens do not divide rows of {phases.longest}; take a divisor"))
        elif phase.n_steps is None and n_parts > 1:
            found.append((number, f"the last phase has the longest rows, and {phase.seq_len} tokens are fewer than {phases.longest}"))
        elif phase.n_steps is not None and _n_rows(phase) % n_parts:
            message = f"{_n_rows(phase)} rows of {phase.seq_len} tokens do not fill whole rows of {phases.longest}"
            found.append((number, f"{message}: make its steps times its rows a multiple of {n_parts}"))
    return found
