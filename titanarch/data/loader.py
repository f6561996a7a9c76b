"""The training loader of a run, and that of indexed data."""

from collections.abc import Mapping, Sequence
from typing import Any

from titanarch.data.batch import Batch, make_batch
from titanarch.data.config import DataConfig
from titanarch.data.layout import RunLayout
from titanarch.data.ledger import Origins
from titanarch.data.mixed_rows import training_rows
from titanarch.data.phases import Phase, Phases
from titanarch.data.repeats import Passes
from titanarch.data.row_loader import RowLoader
from titanarch.data.rows import RunRows
from titanarch.data.skips import SkipCounts
from titanarch.data.sources import MixtureConfig
from titanarch.data.split import SplitSource, opened_mixture
from titanarch.data.streamed_loader import MixedStreamLoader, StreamedLoader
from titanarch.data.tokenizers import Tokenizer
from titanarch.data.workers import IndexedWorkers


class IndexedLoader(RowLoader):
    """Rows of tokenized data in a seeded order, a new one each epoch, or of several such data."""

    def __init__(self, rows: RunRows, layouts: RunLayout, *, n_workers: int, start_row: int) -> None:
        super().__init__(layouts, fingerprint=rows.fingerprint, start_row=start_row)
        self.rows = rows
        self._n_workers = n_workers
        self._workers: IndexedWorkers | None = None

    @property
    def epoch(self) -> int:
        return self.rows.epoch(self.next_row)

    @property
    def origins(self) -> Origins:
        return Origins(windows=self.rows.source_windows, n_parts=self.phases.parts_of_window)

    @property
    def source_epochs(self) -> dict[str, float]:
        return self.rows.source_epochs(self.next_row)

    def passes(self, end_row: int) -> list[Passes]:
        return self.rows.passes(end_row)

    @property
    def skipped(self) -> SkipCounts:
        return self.rows.skipped

    @property
    def ended(self) -> str:
        return self.rows.ended(self.next_row + self.layout.global_batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self.rows.state(self.next_row)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.rows.begin_at(state)

    def _load(self, first_row: int) -> Batch:
        if self._n_workers == 0:
            return make_batch(self.rows.read(first_row, self.layout.local_batch_size))
        if self._workers is None:
            phase = self.phase
            until = None if phase.n_steps is None else phase.first_step + phase.n_steps
            self._workers = IndexedWorkers(
                self.rows, self.layout, step=self._step, micro_batch=self._micro_batch, until_step=until, n_workers=self._n_workers
            )
        return make_batch(self._workers.next())

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None


def build_loader(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    global_batch_size: int,
    local_batch_size: int,
    dp_rank: int,
    dp_degree: int,
    seed: int,
    start_row: int = 0,
    earlier: Sequence[Phase] = (),
) -> RowLoader:
    """The training loader of one data-parallel rank.

    ``seq_len``: tokens a row. Batch sizes are in rows. ``seed`` orders the rows. ``start_row`` begins a step; streams
    start elsewhere than at 0 by ``load_state_dict`` alone. ``earlier``: phases before that of these sizes. The
    first call for a text source in indexed mode tokenizes it into the cache while other processes wait. Raises ConfigError,
    and DataError for what is wrong with the data.
    """
    phases = Phases.of([*earlier, Phase(seq_len, global_batch_size, local_batch_size)])
    layouts = RunLayout(phases, dp_rank, dp_degree)
    if config.mode == "indexed":
        rows = training_rows(config, tokenizer, seq_len=seq_len, seed=seed, phases=phases)
        return IndexedLoader(rows, layouts, n_workers=config.workers, start_row=start_row)
    if isinstance(config.source, MixtureConfig):
        sources = opened_mixture(config, lambda alone: SplitSource(alone, "train"))
        return MixedStreamLoader(sources, config.source, tokenizer, layouts, config=config, seed=seed, start_row=start_row)
    source = SplitSource(config, "train")
    return StreamedLoader(source, tokenizer, layouts, config=config, seed=seed, start_row=start_row)
