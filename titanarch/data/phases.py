"""The phases of a run: of how many rows, of how many tokens, a step is made, from which row on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, lcm


@dataclass(frozen=True)
class Phase:
    """``n_steps`` steps, None for all that follow, of ``global_batch_size`` rows of ``seq_len`` tokens.

    ``local_batch_size``: rows of a micro-batch. The phase begins with step, row and token ``first_step``, ``first_row`` and
    ``first_token``, counted from 0 over the rows of the run in their order, used or left out; ``Phases`` counts them.
    """

    seq_len: int
    global_batch_size: int
    local_batch_size: int
    n_steps: int | None = None
    first_step: int = 0
    first_row: int = 0
    first_token: int = 0

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.global_batch_size


@dataclass(frozen=True)
class Phases:
    """``parts``: in order, at least one; the last one alone has no number of steps."""

    parts: tuple[Phase, ...]

    @classmethod
    def of(cls, phases: Sequence[Phase]) -> "Phases":
        """Where each of ``phases`` begins is counted here."""
        assert phases, "a run has a last phase"
        step = row = token = 0
        parts = []
        for phase in phases:
            parts.append(replace(phase, first_step=step, first_row=row, first_token=token))
            n_steps = phase.n_steps or 0
            step, row, token = step + n_steps, row + n_steps * phase.global_batch_size, token + n_steps * phase.tokens_per_step
        assert [part.n_steps is None for part in parts] == [False] * (len(parts) - 1) + [True], "the last phase alone is endless"
        return cls(tuple(parts))

    @cached_property
    def longest(self) -> int:
        """The largest ``seq_len``, tokens."""
        return max(part.seq_len for part in self.parts)

    def at_step(self, step: int) -> Phase:
        """The phase of a step."""
        return next(part for part in reversed(self.parts) if part.first_step <= step)

    def at_row(self, row: int) -> Phase:
        """The phase of a row."""
        return next(part for part in reversed(self.parts) if part.first_row <= row)

    def step_of(self, row: int) -> int:
        """The step that begins with ``row``. Raises ValueError where none does."""
        phase = self.at_row(row)
        n_steps, rest = divmod(row - phase.first_row, phase.global_batch_size)
        if rest:
            raise ValueError(f"row {row} does not begin a step of {phase.global_batch_size} rows")
        return phase.first_step + n_steps

    def rows_before(self, step: int) -> int:
        """Rows of the steps before ``step``."""
        phase = self.at_step(step)
        return phase.first_row + (step - phase.first_step) * phase.global_batch_size

    def tokens_before(self, step: int) -> int:
        """Tokens of the steps before ``step``."""
        phase = self.at_step(step)
        return phase.first_token + (step - phase.first_step) * phase.tokens_per_step

    def steps_for(self, n_tokens: int) -> int:
        """The fewest steps that have ``n_tokens`` tokens or more."""
        phase = next(part for part in reversed(self.parts) if part.first_token < n_tokens or part.first_token == 0)
        return phase.first_step + ceil((n_tokens - phase.first_token) / phase.tokens_per_step)

    @property
    def changes_length(self) -> bool:
        """Whether rows of different lengths are in the run."""
        return len({part.seq_len for part in self.parts}) > 1

    def windows_before(self, row: int) -> float:
        """How many windows of the longest length the rows before ``row`` are, in tokens."""
        phase = self.at_row(row)
        return (phase.first_token + (row - phase.first_row) * phase.seq_len) / self.longest

    def row_of(self, window: int) -> int:
        """The row with which window ``window`` of the longest length begins, where the rows are parts of windows in their order."""
        token = window * self.longest
        phase = next(part for part in reversed(self.parts) if part.first_token <= token)
        return phase.first_row + (token - phase.first_token) // phase.seq_len

    @cached_property
    def parts_of_window(self) -> int:
        """In how many equal parts a window of the longest length has to be seen so that each row is some of them."""
        return lcm(*(self.longest // part.seq_len for part in self.parts))

    def state(self, row: int) -> list[list[int]]:
        """[tokens of a row, rows of that length] for each phase that rows before ``row`` are of."""
        begun = [part for part in self.parts if part.first_row < row or part.first_row == 0]
        ends = [part.first_row for part in begun[1:]] + [row]
        return [[part.seq_len, end - part.first_row] for part, end in zip(begun, ends, strict=True)]
