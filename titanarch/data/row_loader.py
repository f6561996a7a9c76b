"""What every training loader is: micro-batches whose rows depend on nothing but their number in the run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from titanarch.data.batch import Batch, keep_freed_memory
from titanarch.data.errors import data_error
from titanarch.data.layout import RowLayout, RunLayout
from titanarch.data.ledger import Origins
from titanarch.data.phases import Phase, Phases
from titanarch.data.repeats import Passes
from titanarch.data.skips import SkipCounts


class RowLoader(ABC, Iterator[Batch]):
    """An endless iterator over the micro-batches of one rank: ``accumulation_steps`` of them make a step.

    ``state_dict`` counts what was handed out, whatever workers have prepared beyond that. It holds JSON values only,
    names no rank, worker or micro-batch size, and is taken between steps. ``merge_states`` joins those of all ranks
    into one that any layout loads. Where streams move between ranks as a phase begins, ``wants_merged_state`` is true until each rank
    has loaded that, and no row is given before.
    """

    def __init__(self, layouts: RunLayout, *, fingerprint: str, start_row: int) -> None:
        self.layouts = layouts
        self._fingerprint = fingerprint
        keep_freed_memory()
        self._step, self._micro_batch = layouts.phases.step_of(start_row), 0

    @property
    def phases(self) -> Phases:
        return self.layouts.phases

    @property
    def phase(self) -> Phase:
        """Of the step that comes next or is under way."""
        return self.phases.at_step(self._step)

    @property
    def layout(self) -> RowLayout:
        """Of the step that comes next or is under way."""
        return self.layouts.at_step(self._step)

    @property
    def accumulation_steps(self) -> int:
        return self.layout.accumulation_steps

    @property
    def next_row(self) -> int:
        """The first row of the step that comes next or is under way."""
        return self.phases.rows_before(self._step)

    @property
    @abstractmethod
    def epoch(self) -> int:
        """Whole passes over the training data that are behind."""

    @property
    @abstractmethod
    def origins(self) -> Origins:
        """What ``origin_BI`` of its batches means."""

    @property
    def source_epochs(self) -> dict[str, float]:
        """Passes over each source of a mixture that are behind, by its name; empty where there is one source."""
        return {}

    def passes(self, end_row: int) -> list[Passes]:
        """How much of each source the rows before ``end_row`` take; empty where only reading will tell."""
        return []

    @property
    def skipped(self) -> SkipCounts:
        """What could not be read: of all indexed data, or of a stream's source as far as this process has read it since its start."""
        return SkipCounts()

    @property
    def wants_merged_state(self) -> bool:
        """Whether the merged state of all ranks has to be loaded before the next step. Asked for between steps; alike on all ranks."""
        return False

    @property
    def ended(self) -> str:
        """Why the step that comes next cannot be had, as far as this rank knows; empty where it can. Asked for between steps."""
        return ""

    def ended_for_all(self, least: Callable[[float], float]) -> str:
        """``ended`` as all ranks together know it. Collective where each rank knows of its own rows alone: ``least`` then gives the least
        of a number of each rank; others do not call it."""
        return self.ended

    def __next__(self) -> Batch:
        if self._micro_batch == 0 and (reason := self.ended):
            raise data_error(reason, key="data.source.sources")
        batch = self._load(self.layout.first_row(self._step, self._micro_batch))
        self._micro_batch += 1
        if self._micro_batch == self.accumulation_steps:
            before = self.phase
            self._step, self._micro_batch = self._step + 1, 0
            if self.phase is not before:
                self._begin_phase()
        return batch

    def _begin_phase(self) -> None:
        """The step that comes next is the first of its phase."""
        self.close()

    @abstractmethod
    def _load(self, first_row: int) -> Batch:
        """The micro-batch that begins at ``first_row``; asked for in order."""

    @abstractmethod
    def close(self) -> None:
        """Stop the workers, if any; iterating again starts them anew."""

    def state_dict(self) -> dict[str, Any]:
        """Where to go on. Raises RuntimeError inside a step, where ranks and micro-batches would be in the state."""
        if self._micro_batch:
            done = f"{self._micro_batch} of {self.accumulation_steps} micro-batches"
            raise RuntimeError(f"the data state was asked for inside a step, after {done}")
        return {"data": self._fingerprint, "phases": self.phases.state(self.next_row)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises DataError where it belongs to other data or another row length."""
        step = self._step_of(state)
        self.close()
        self._step, self._micro_batch = step, 0

    def _step_of(self, state: Mapping[str, Any]) -> int:
        """The step that comes next where ``state`` was taken; raises what ``load_state_dict`` does, and changes nothing."""
        if state["data"] != self._fingerprint:
            raise data_error("the training data have changed since the checkpoint: restore them, or start another run", key="data")
        row = sum(rows for _, rows in state["phases"])
        phase = self.phases.at_row(row)
        if self.phases.state(row) != state["phases"] or (row - phase.first_row) % phase.global_batch_size:
            seen = " and ".join(f"{rows} rows of {length} tokens" for length, rows in state["phases"])
            message = f"the checkpoint stands after {seen}; from row {phase.first_row} on the run has {phase.global_batch_size} rows"
            raise data_error(f"{message} of {phase.seq_len} tokens a step", key="training.seq_len")
        return self.phases.step_of(row)


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state from those of all ranks, which were taken after the same step."""
    merged = dict(states[0])
    for state in states[1:]:
        if {**state, "cursors": None} != {**merged, "cursors": None}:
            raise ValueError("the ranks' data states were not taken after the same step")
        if "cursors" in merged:
            merged["cursors"] = {**merged["cursors"], **state["cursors"]}
    return merged
