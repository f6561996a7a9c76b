"""Which windows of a source the rows of a run are, where its phases have rows of different lengths.

A source has W windows of the run's longest length L a pass, in a new order each epoch. A phase of rows of L / n tokens takes
windows in that order as any phase does, so that none is used twice in an epoch or left out between phases, and cuts each
into n parts, which are its rows: the first parts of all of its windows, then the second ones, and so on, so that a step
seldom has two parts of a window. A phase that goes on into another epoch ends the parts of one before it begins the next.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from titanarch.data.phases import Phase, Phases

ENDLESS = 1 << 62


class Stretch(NamedTuple):
    """What a phase takes of a source: ``n_windows`` windows from place ``first`` on in the order of the source, each ``n_parts`` rows."""

    first: int
    n_windows: int
    n_parts: int


class Span(NamedTuple):
    """``n_rows`` rows in order: each part ``part`` of ``n_parts`` of a window, those from ``place`` on in the order of the source."""

    place: int
    part: int
    n_parts: int
    n_rows: int


def spans(stretch: Stretch, first: int, n_rows: int, *, n_windows: int) -> list[Span]:
    """Rows ``first`` to ``first + n_rows`` of those that ``stretch`` has, of a source of ``n_windows`` windows a pass."""
    found, row, end = [], first, first + n_rows
    while row < end:
        span = _span(stretch, row, end - row, n_windows)
        found.append(span)
        row += span.n_rows
    return found


def _span(stretch: Stretch, row: int, most: int, n_windows: int) -> Span:
    """The rows of ``stretch`` from ``row`` on that follow each other, at most ``most``."""
    (first, n, n_parts), W = stretch, n_windows
    size = min(n, W - first % W)  # of the epoch in which the phase begins
    if row >= size * n_parts:
        n_epochs, row = divmod(row - size * n_parts, W * n_parts)
        n -= size + n_epochs * W
        first += size + n_epochs * W
        size = min(W, n)
    part, place = divmod(row, size)
    return Span(first + place, part, n_parts, min(most, size - place))


def stretches(phases: Phases) -> Mapping[Phase, Stretch]:
    """Of each phase, over windows in the order of the run.

    The lengths of all phases divide the longest, and the rows of each phase but the last fill whole windows: see ``problems``.
    """
    assert not problems(phases), "the configuration refuses it"
    found = {}
    for phase in phases.parts:
        n_parts = phases.longest // phase.seq_len
        found[phase] = Stretch(phase.first_token // phases.longest, _n_rows(phase) // n_parts, n_parts)
    return found


class PhasedWindows:
    """The windows of the rows of ``phases``, as ``stretches`` wants them, over one source of ``n_windows`` windows a pass."""

    def __init__(self, phases: Phases, n_windows: int) -> None:
        self._phases, self._n_windows, self._stretches = phases, n_windows, stretches(phases)

    def spans(self, first_row: int, n_rows: int) -> list[Span]:
        """Rows ``first_row`` to ``first_row + n_rows``."""
        found, row, end = [], first_row, first_row + n_rows
        while row < end:
            phase = self._phases.at_row(row)
            n = min(end, phase.first_row + _n_rows(phase)) - row
            found += spans(self._stretches[phase], row - phase.first_row, n, n_windows=self._n_windows)
            row += n
        return found


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
