"""Which rows of the run each data-parallel rank takes at each step.

Shapes: S streams.
"""

from dataclasses import dataclass
from functools import cached_property
from math import lcm

import numpy as np

from titanarch.config.errors import ConfigError, Problem
from titanarch.data.phases import Phases


@dataclass(frozen=True)
class RowLayout:
    """Step s of G rows is rows F + s * G to F + s * G + G - 1 of the run. In micro-batch m, rank r holds rows
    F + s * G + (m * dp_degree + r) * b + [0, b), with b = ``local_batch_size`` and F = ``first_row_of_step_0``, which is 0 but
    for the later phases of a run.

    Raises ConfigError where G is no multiple of b * dp_degree.
    """

    global_batch_size: int
    local_batch_size: int
    dp_rank: int
    dp_degree: int
    first_row_of_step_0: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.dp_rank < self.dp_degree, "ranks count from 0"
        at_once = self.local_batch_size * self.dp_degree
        if self.local_batch_size < 1 or self.global_batch_size < 1 or self.global_batch_size % at_once:
            raise ConfigError(
                Problem(
                    f"{self.global_batch_size} rows a step do not divide into micro-batches of {self.local_batch_size} rows on "
                    f"{self.dp_degree} data-parallel ranks: make it a multiple of {at_once}, or choose another training.local_batch_size",
                    key="training.global_batch_size",
                )
            )

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.global_batch_size // (self.local_batch_size * self.dp_degree)

    def first_row(self, step: int, micro_batch: int) -> int:
        """The first of the rows of a micro-batch of this rank."""
        before = (micro_batch * self.dp_degree + self.dp_rank) * self.local_batch_size
        return self.first_row_of_step_0 + step * self.global_batch_size + before

    def streams(self, n_streams: int) -> list[int]:
        """The streams (row number mod ``n_streams``) of this rank, in the order of its rows; a multiple of G of them."""
        steps = n_streams // self.global_batch_size
        firsts = [self.first_row(step, m) for step in range(steps) for m in range(self.accumulation_steps)]
        return [(first + i) % n_streams for first in firsts for i in range(self.local_batch_size)]

    def owners(self, n_streams: int) -> np.ndarray:
        """The rank of each of ``n_streams`` streams, a multiple of G of them, int64 [S]."""
        place_S = (np.arange(n_streams) - self.first_row_of_step_0) % self.global_batch_size
        return place_S // self.local_batch_size % self.dp_degree


@dataclass(frozen=True)
class RunLayout:
    """The rows of a data-parallel rank through the phases of a run. Raises ConfigError where those of a phase do not divide."""

    phases: Phases
    dp_rank: int
    dp_degree: int

    def __post_init__(self) -> None:
        assert self._layouts, "made here, so that what is wrong is told at once"

    @cached_property
    def _layouts(self) -> list[RowLayout]:
        return [
            RowLayout(
                phase.global_batch_size,
                phase.local_batch_size,
                self.dp_rank,
                self.dp_degree,
                phase.first_row - phase.first_step * phase.global_batch_size,
            )
            for phase in self.phases.parts
        ]

    def at_step(self, step: int) -> RowLayout:
        """That of the phase of a step."""
        return self._layouts[self.phases.parts.index(self.phases.at_step(step))]

    def n_streams(self, wanted: int, *, n_workers: int) -> int:
        """The number R of streams: ``wanted``, or for 0 the least there can be.

        Raises ConfigError where R is no multiple of the global batch of every phase, or there are more workers than streams of a rank,
        which are as many in each phase.
        """
        batches = [layout.global_batch_size for layout in self._layouts]
        n_streams = wanted or lcm(*batches)
        for rows in (rows for rows in batches if n_streams % rows):
            message = f"{n_streams} streams are no multiple of the {rows} rows of a global batch"
            raise ConfigError(Problem(f"{message}: give a multiple, or 0 for as many", "data.streams"))
        own = n_streams // self.dp_degree
        if n_workers > own:
            message = f"{n_workers} workers are more than the {own} streams of a rank: give at most as many"
            raise ConfigError(Problem(message, "data.workers"))
        return n_streams

    def streams_move(self, step: int, n_streams: int) -> bool:
        """Whether a stream is another rank's at ``step``, above 0, than at the step before. Alike on all ranks."""
        before, now = self.at_step(step - 1), self.at_step(step)
        return before is not now and bool((before.owners(n_streams) != now.owners(n_streams)).any())
