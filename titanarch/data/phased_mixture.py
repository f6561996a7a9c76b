"""Which rows of which source the rows of a mixture are, where its phases have rows of different lengths.

The mixture orders windows of the run's longest length. A phase of rows of L / n tokens takes the next windows of that order. Its row
i is of the source of its window i // n, so that at any row the sources have the shares of their weights there, in tokens. Which row
of that source it is follows from ``phased_windows``, by what the phase takes of the source: the first parts of all its windows there,
then the second ones, those of one epoch of the source before those of the next. So no source waits for another one's parts.

What a phase takes of each source is found by giving its windows out once beforehand, which takes some 3 µs a window.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from titanarch.data.mixture import MixturePlan, Rows
from titanarch.data.phased_windows import ENDLESS, Span, Stretch, spans, stretches
from titanarch.data.phases import Phase, Phases


class PhasedMixture:
    """The rows of ``phases`` by their numbers, from where ``windows``, the plan of their windows, stands on."""

    def __init__(self, windows: MixturePlan, phases: Phases) -> None:
        self._windows, self._phases, self._stretches = windows, phases, stretches(phases)
        self._shared: tuple[Phase, list[Stretch]] | None = None

    def rows(self, first_row: int, n_rows: int) -> Rows:
        """Rows ``first_row`` to ``first_row + n_rows``, all of one phase; ``index_N`` counts those of a source in that phase."""
        phase = self._phases.at_row(first_row)
        first, _, n_parts = self._stretches[phase]
        row_N = np.arange(first_row, first_row + n_rows) - phase.first_row
        window_N, part_N = np.divmod(row_N, n_parts)
        windows = self._windows.rows(first + int(window_N[0]), int(window_N[-1] - window_N[0]) + 1)
        source_N, index_N = windows.source_N[window_N - window_N[0]], windows.index_N[window_N - window_N[0]]
        first_S = np.array([stretch.first for stretch in self._of_sources(phase)])
        return Rows(source_N, (index_N - first_S[source_N]) * n_parts + part_N)

    def spans(self, source: int, row: int, first: int, n_rows: int, *, n_windows: int) -> list[Span]:
        """Rows ``first`` to ``first + n_rows`` of ``source``, counted in the phase of ``row``; it has ``n_windows`` windows a pass."""
        return spans(self._of_sources(self._phases.at_row(row))[source], first, n_rows, n_windows=n_windows)

    def taken(self, row: int) -> list[float]:
        """Windows of each source that the rows before ``row`` are, in tokens."""
        phase = self._phases.at_row(row)
        first, _, n_parts = self._stretches[phase]
        window, part = divmod(row - phase.first_row, n_parts)
        taken = self._windows.taken(first + window)
        if part:
            taken[int(self._windows.rows(first + window, 1).source_N[0])] += part / n_parts
        return taken

    def state(self, row: int) -> dict[str, Any]:
        """The state of the order where the phase of ``row`` begins, since what it takes of each source counts from there.

        In a phase of the longest rows: at ``row``.
        """
        phase = self._phases.at_row(row)
        first, _, n_parts = self._stretches[phase]
        return self._windows.state(first if n_parts > 1 else first + row - phase.first_row)

    def begin_at(self, state: Mapping[str, Any]) -> None:
        """Begin at the phase or row of ``state``."""
        self._windows.begin_at(state)
        self._shared = None

    def _of_sources(self, phase: Phase) -> list[Stretch]:
        """What ``phase`` takes of each source."""
        if self._shared is None or self._shared[0] != phase:
            first, n_windows, n_parts = self._stretches[phase]
            if n_parts > 1:
                before, after = self._windows.state(first)["taken"], self._windows.state(first + n_windows)["taken"]
                shared = [Stretch(a, b - a, n_parts) for a, b in zip(before, after, strict=True)]
            else:  # windows that are rows stay in their order, wherever the phase begins and ends
                shared = [Stretch(0, ENDLESS, 1)] * self._windows.n_sources
            self._shared = (phase, shared)
        return self._shared[1]
