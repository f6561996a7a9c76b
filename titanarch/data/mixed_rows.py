"""The rows of a mixture: each those of one source, in the order of the mixture."""

import hashlib
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from titanarch.config.errors import ConfigError
from titanarch.data.batch import Windows
from titanarch.data.cache import open_mixture, open_tokens
from titanarch.data.config import DataConfig
from titanarch.data.indexed import IndexedData
from titanarch.data.mixture import MixtureOrder, MixturePlan, Part, Rows
from titanarch.data.packing import Packing
from titanarch.data.phased_mixture import PhasedMixture
from titanarch.data.phases import Phases
from titanarch.data.repeats import Passes
from titanarch.data.rows import IndexedRows, RunRows
from titanarch.data.skips import SkipCounts, count
from titanarch.data.sources import MixtureConfig
from titanarch.data.tokenizers import Tokenizer


class MixedRows(RunRows):
    """Row k of a run: the next row of the source that the mixture gives it to, ``data`` being the sources' tokens.

    ``phases`` of shorter rows are as ``PhasedMixture`` has them. Raises ConfigError where a source has no row.
    """

    def __init__(
        self,
        config: MixtureConfig,
        data: Sequence[IndexedData],
        *,
        seq_len: int,
        seed: int,
        packing: Packing,
        phases: Phases | None = None,
    ) -> None:
        self.config, self.seq_len = config, seq_len
        self.sources: list[IndexedRows] = []
        for name, one in zip(config.names, data, strict=True):
            try:
                self.sources.append(IndexedRows(one, seq_len=seq_len, seed=seed, packing=packing))
            except ConfigError as error:
                raise ConfigError(*(replace(each, message=f"in the source {name}, {each.message}") for each in error.problems)) from error
        self.fingerprint = hashlib.sha256(" ".join(source.fingerprint for source in self.sources).encode()).hexdigest()
        self._phases = phases if phases is not None and phases.changes_length else None
        self._order = mixture_order(config, [(rows.n_windows, rows.tokens_per_row) for rows in self.sources], self._phases)
        windows = MixturePlan(self._order)
        self._phased = None if self._phases is None else PhasedMixture(windows, self._phases)
        self._plan: MixturePlan | PhasedMixture = self._phased or windows

    def read(self, first_row: int, n_rows: int) -> Windows:
        return self._read(self._plan.rows(first_row, n_rows), first_row)

    @property
    def skipped(self) -> SkipCounts:
        return count(skip for source in self.sources for skip in source.data.meta.skipped)

    @property
    def source_windows(self) -> dict[str, int]:
        return {name: rows.n_windows for name, rows in zip(self.config.names, self.sources, strict=True)}

    def passes(self, end_row: int) -> list[Passes]:
        sizes = [rows.n_windows for rows in self.sources]
        once = [n if source.at_end != "repeat" else math.inf for n, source in zip(sizes, self.config.sources, strict=True)]

        def due_before(row: int) -> list[float]:
            return self._order.due(row if self._phases is None else self._phases.windows_before(row))

        def lasts(row: int) -> bool:
            return all(due <= n + 1 for due, n in zip(due_before(row), once, strict=True))

        if not lasts(end_row):  # the run ends where a source does
            end_row = bisect_left(range(end_row), True, key=lambda row: not lasts(row))
        due = due_before(end_row)
        return [
            Passes(name, n / size, rows.data.n_tokens)
            for name, n, size, rows in zip(self.config.names, due, sizes, self.sources, strict=True)
        ]

    def epoch(self, row: int) -> int:
        """Of the source that has had the fewest."""
        return int(min(self.source_epochs(row).values()))

    def source_epochs(self, row: int) -> dict[str, float]:
        taken = self._plan.taken(row)
        return {name: n / rows.n_windows for name, n, rows in zip(self.config.names, taken, self.sources, strict=True)}

    def ended(self, end_row: int) -> str:
        """A source that is to be dropped ends the run where it is the last."""
        taken = self._plan.taken(end_row)
        for name, source, n, rows in zip(self.config.names, self.config.sources, taken, self.sources, strict=True):
            if source.at_end != "repeat" and n > rows.n_windows:
                own = f"{rows.n_windows} rows" if self._phases is None else f"{rows.n_windows} rows of {self.seq_len} tokens"
                return f"the source {name} has ended: its {own} do not last to row {end_row} of the run"
        return ""

    def state(self, row: int) -> dict[str, Any]:
        return {"mixture": self._plan.state(row)}

    def begin_at(self, state: Mapping[str, Any]) -> None:
        self._plan.begin_at(state["mixture"])

    def _read(self, rows: Rows, first_row: int) -> Windows:
        """``rows`` of the sources as the rows from ``first_row`` on."""
        places = [np.flatnonzero(rows.source_N == i) for i in range(len(self.sources))]
        read = [
            (place_N, self._read_source(i, int(rows.index_N[place_N[0]]), first_row + place_N))
            for i, place_N in enumerate(places)
            if len(place_N)
        ]
        return interleaved(read, np.arange(first_row, first_row + len(rows.source_N)))

    def _read_source(self, i: int, first: int, row_B: np.ndarray) -> Windows:
        """The rows of source ``i`` from ``first`` on, as its plan counts them, under the numbers ``row_B`` of the run."""
        source = self.sources[i]
        if self._phased is None:
            return source.read_as(first, row_B, source=i)
        spans = self._phased.spans(i, int(row_B[0]), first, len(row_B), n_windows=source.n_windows)
        return source.read_spans(spans, row_B, source=i)


def interleaved(parts: Sequence[tuple[np.ndarray, Windows]], row_B: np.ndarray) -> Windows:
    """One Windows of ``parts``, each with the places of its rows among ``row_B``, the numbers of all."""
    n_columns = parts[0][1].tokens_BS.shape[1]
    tokens_BS = np.empty((len(row_B), n_columns), dtype=np.result_type(*(windows.tokens_BS for _, windows in parts)))
    real_B = np.full(len(row_B), n_columns, dtype=np.int64)
    for place_N, windows in parts:
        tokens_BS[place_N] = windows.tokens_BS
        if windows.real_B is not None:
            real_B[place_N] = windows.real_B
    row_E = np.concatenate([place_N[windows.start_row_E] for place_N, windows in parts])
    column_E = np.concatenate([windows.start_column_E for _, windows in parts])
    order_E = np.argsort(row_E, kind="stable")
    padded = bool((real_B < n_columns).any())
    return Windows(tokens_BS, row_E[order_E], column_E[order_E], row_B, real_B if padded else None, _origins(parts, len(row_B)))


def _origins(parts: Sequence[tuple[np.ndarray, Windows]], n_rows: int) -> np.ndarray | None:
    """Where the rows of ``parts`` come from, in their places; None where they do not say."""
    origins = [(place_N, windows.origin_BI) for place_N, windows in parts if windows.origin_BI is not None]
    if len(origins) < len(parts):
        return None
    origin_BI = np.empty((n_rows, origins[0][1].shape[1]), dtype=np.int64)
    for place_N, origin_NI in origins:
        origin_BI[place_N] = origin_NI
    return origin_BI


def mixture_order(config: MixtureConfig, sizes: Sequence[tuple[int, float]], phases: Phases | None = None) -> MixtureOrder:
    """The order of sources with ``sizes``: rows of a pass, and tokens of a row that are no padding, on average.

    Weights are shares of tokens, so a source with less of them in a row has more rows. ``phases``: as for MixtureOrder.
    """
    parts = [
        Part(name, tuple((row, weight / tokens) for row, weight in source.knots), n_rows, source.at_end == "drop")
        for name, source, (n_rows, tokens) in zip(config.names, config.sources, sizes, strict=True)
    ]
    return MixtureOrder(parts, phases)


def training_rows(config: DataConfig, tokenizer: Tokenizer, *, seq_len: int, seed: int, phases: Phases | None = None) -> RunRows:
    """The rows of a run on indexed data, of one source or of a mixture; ``phases``: None where all are alike. Raises ConfigError."""
    if isinstance(config.source, MixtureConfig):
        mixed = open_mixture(config, tokenizer)
        return MixedRows(config.source, mixed, seq_len=seq_len, seed=seed, packing=config.packing, phases=phases)
    data = open_tokens(config, "train", tokenizer)
    return IndexedRows(data, seq_len=seq_len, seed=seed, packing=config.packing, phases=phases)
