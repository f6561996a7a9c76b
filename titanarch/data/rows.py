"""Indexed rows: the rows that a packing makes of the documents, in a new seeded order each epoch.

Shapes: B rows, T tokens a row, S = T + 1 tokens of a window, W windows, P pieces of documents, E beginnings of documents.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from titanarch.config.errors import ConfigError, Problem
from titanarch.data.batch import Windows
from titanarch.data.indexed import IndexedData
from titanarch.data.packing import Packing, Plan, plan
from titanarch.data.permutation import Permutation
from titanarch.data.phased_windows import PhasedWindows, Span
from titanarch.data.phases import Phases
from titanarch.data.repeats import Passes
from titanarch.data.skips import SkipCounts, count

ORDER_CHUNK = 1024  # rows whose windows are computed at once: far less work a row than one by one


class RunRows(ABC):
    """The rows of a run. ``fingerprint`` is a hash of the data they come from."""

    fingerprint: str

    @abstractmethod
    def read(self, first_row: int, n_rows: int) -> Windows:
        """Rows ``first_row`` to ``first_row + n_rows``, all of one phase."""

    @property
    @abstractmethod
    def source_windows(self) -> dict[str, int]:
        """Windows of each source, by its name; one source alone is named ""."""

    @abstractmethod
    def passes(self, end_row: int) -> list[Passes]:
        """How much of each source the rows before ``end_row`` take; known beforehand, in a mixture to within a few rows."""

    @abstractmethod
    def epoch(self, row: int) -> int:
        """Whole passes over the data before ``row``."""

    def source_epochs(self, row: int) -> dict[str, float]:
        """Passes over each source before ``row``, by its name; none where there is one source."""
        return {}

    @property
    def skipped(self) -> SkipCounts:
        """What the data lack because it could not be read."""
        return SkipCounts()

    def ended(self, end_row: int) -> str:
        """Why the rows before ``end_row`` are not all there; empty where they are."""
        return ""

    def state(self, row: int) -> dict[str, Any]:
        """What has to be known to go on at ``row``, as JSON values."""
        return {}

    def begin_at(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most rows follow from their numbers
        """Go on where ``state`` was taken; rows before it are not read again."""


class IndexedRows(RunRows):
    """Row k of a run: window ``permutation(k mod W)`` of the W windows, the permutation that of epoch k // W.

    "concat": window w holds tokens w * T to w * T + T of the documents end to end, so the last token of a window, a
    target, is the first of the next. What is left at the end, less than a window, is not trained on. "best_fit" and
    "padded": window w is row w of the plan of ``packing``. ``phases`` of shorter rows, for "concat" and "best_fit", are parts of
    windows, as ``PhasedWindows`` has them. Raises ConfigError where there is no window.
    """

    def __init__(self, data: IndexedData, *, seq_len: int, seed: int, packing: Packing, phases: Phases | None = None) -> None:
        self.data = data
        self.seq_len = seq_len
        self.fingerprint = data.fingerprint
        self._seed = seed
        self._plan = None if packing == "concat" else plan(packing, data.starts, seq_len=seq_len)
        self.n_windows = (data.n_tokens - 1) // seq_len if self._plan is None else self._plan.n_rows
        self._phases = phases if phases is not None and phases.changes_length else None
        self._phased = PhasedWindows(self._phases, self.n_windows) if self._phases is not None else None
        assert self._phased is None or packing != "padded", "the configuration refuses it"
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        if self.n_windows < 1:
            raise ConfigError(
                Problem(
                    f"the training data have {data.n_tokens} tokens, too few for one row of {seq_len} and its last target: "
                    "give more data or a smaller training.seq_len",
                    key="training.seq_len",
                )
            )

    @property
    def tokens_per_row(self) -> float:
        """Tokens of a row that are no padding, on average."""
        return self.seq_len if self._plan is None else float(np.minimum(self._plan.size_P, self.seq_len).sum() / self.n_windows)

    @property
    def skipped(self) -> SkipCounts:
        return count(self.data.meta.skipped)

    @property
    def source_windows(self) -> dict[str, int]:
        return {"": self.n_windows}

    def passes(self, end_row: int) -> list[Passes]:
        return [Passes("", self.windows_before(end_row) / self.n_windows, self.data.n_tokens)]

    def epoch(self, row: int) -> int:
        return int(self.windows_before(row) // self.n_windows)

    def windows_before(self, row: int) -> float:
        """How many windows the rows before ``row`` take."""
        return row if self._phases is None else self._phases.windows_before(row)

    def windows(self, first_place: int, n_places: int) -> np.ndarray:
        """The windows at places ``first_place`` to ``first_place + n_places`` of the run's order, int64 [n_places]."""
        parts = []
        row, end = first_place, first_place + n_places
        while row < end:
            chunk, place = divmod(row, ORDER_CHUNK)
            part = self._chunk(chunk)[place : place + end - row]
            parts.append(part)
            row += len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _chunk(self, chunk: int) -> np.ndarray:
        if self._order[0] != chunk:
            epoch_W, index_W = np.divmod(np.arange(chunk * ORDER_CHUNK, (chunk + 1) * ORDER_CHUNK), self.n_windows)
            for epoch in np.unique(epoch_W):
                permutation = Permutation(self.n_windows, seed=self._seed, epoch=int(epoch))
                index_W[epoch_W == epoch] = permutation(index_W[epoch_W == epoch])
            self._order = (chunk, index_W)
        return self._order[1]

    def read(self, first_row: int, n_rows: int) -> Windows:
        return self.read_as(first_row, np.arange(first_row, first_row + n_rows))

    def read_as(self, first_row: int, row_B: np.ndarray, *, source: int = 0) -> Windows:
        """As many rows as ``row_B`` has numbers, from ``first_row`` on, under the numbers ``row_B``; ``source``: which one this is."""
        if self._phased is not None:
            return self.read_spans(self._phased.spans(first_row, len(row_B)), row_B, source=source)
        window_B = self.windows(first_row, len(row_B))
        if self._plan is None:
            read = read_windows(self.data, window_B, row_B=row_B, seq_len=self.seq_len)
        else:
            read = read_planned(self.data, self._plan, window_B, row_B=row_B, seq_len=self.seq_len)
        epoch_B = np.arange(first_row, first_row + len(row_B)) // self.n_windows
        return read._replace(origin_BI=np.stack([np.full_like(window_B, source), epoch_B, window_B], axis=1))

    def read_spans(self, spans: Sequence[Span], row_B: np.ndarray, *, source: int = 0) -> Windows:
        """The rows of ``spans``, all of one length, under the numbers ``row_B``; ``source``: which one this is."""
        (n_parts,) = {span.n_parts for span in spans}
        place_B = np.concatenate([np.arange(span.place, span.place + span.n_rows) for span in spans])
        window_B = np.concatenate([self.windows(span.place, span.n_rows) for span in spans])
        part_B = np.repeat([span.part for span in spans], [span.n_rows for span in spans])
        seq_len = self.seq_len // n_parts
        if self._plan is None:
            read = read_windows(self.data, window_B * n_parts + part_B, row_B=row_B, seq_len=seq_len)
        else:
            read = read_planned(self.data, self._plan, window_B, row_B=row_B, seq_len=seq_len, part_B=part_B)
        origins = [np.full_like(window_B, source), place_B // self.n_windows, window_B, part_B, np.full_like(window_B, n_parts)]
        return read._replace(origin_BI=np.stack(origins, axis=1))


def read_windows(data: IndexedData, window_B: np.ndarray, *, row_B: np.ndarray, seq_len: int) -> Windows:
    """The windows ``window_B`` of ``data``, its documents end to end, as the rows numbered ``row_B``, both int64 [B].

    A window past the last whole one is filled up with padding.
    """
    start_B = window_B * seq_len
    tokens_BS = data.windows(start_B, seq_len + 1)
    starts = data.starts
    first_B, end_B = starts.searchsorted(start_B, side="right"), starts.searchsorted(start_B + seq_len, side="right")
    count_B = end_B - first_B
    start_row_E = np.repeat(np.arange(len(window_B)), count_B)
    document_E = np.arange(len(start_row_E)) + np.repeat(first_B - (np.cumsum(count_B) - count_B), count_B)
    real_B = np.minimum(data.n_tokens - start_B, seq_len + 1)
    padded = bool((real_B <= seq_len).any())
    return Windows(tokens_BS, start_row_E, starts[document_E] - start_B[start_row_E], row_B, real_B if padded else None)


def read_planned(
    data: IndexedData, made: Plan, window_B: np.ndarray, *, row_B: np.ndarray, seq_len: int, part_B: np.ndarray | None = None
) -> Windows:
    """The rows ``window_B`` of a plan over ``data`` as the rows numbered ``row_B``, both int64 [B]; token 0 is their padding.

    ``part_B``: which ``seq_len`` tokens of each, counted from 0, and the token after them; None: all, and those are ``seq_len``.
    """
    first_B = made.first_R[window_B]
    count_B = made.first_R[window_B + 1] - first_B
    row_P = np.repeat(np.arange(len(window_B)), count_B)
    begin_B = np.cumsum(count_B) - count_B
    piece_P = np.arange(len(row_P)) + np.repeat(first_B - begin_B, count_B)
    size_P = made.size_P[piece_P].astype(np.int64)
    end_P = np.cumsum(size_P)
    before_B = end_P[begin_B] - size_P[begin_B]
    column_P = end_P - before_B[row_P]  # of the token after the piece, where another document or the padding begins
    real_B = column_P[begin_B + count_B - 1]
    start_P = made.start_P[piece_P]
    if part_B is not None:  # columns count from where the part begins
        column_P -= part_B[row_P] * seq_len
        real_B = np.clip(real_B - part_B * seq_len, 0, seq_len + 1)
        first_P, end_P = np.maximum(column_P - size_P, 0), np.minimum(column_P, seq_len + 1)
        shown = first_P < end_P
        row_P, start_P, column_P = row_P[shown], (start_P - (column_P - size_P) + first_P)[shown], end_P[shown]
        size_P = (end_P - first_P)[shown]
    tokens_BS = np.zeros((len(window_B), seq_len + 1), dtype=data.dtype)
    place_P = row_P * (seq_len + 1) + column_P - size_P
    data.copy_spans(start_P, size_P, into=tokens_BS.reshape(-1), place_P=place_P)
    inside = column_P <= seq_len
    return Windows(tokens_BS, row_P[inside], column_P[inside], row_B, real_B)
