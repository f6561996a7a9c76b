"""Which rows of the run each data-parallel rank takes at each step."""

from dataclasses import dataclass

from titanarch.config.errors import ConfigError, Problem


@dataclass(frozen=True)
class RowLayout:
    """Step s of G rows is rows s * G to s * G + G - 1 of the run. In micro-batch m, rank r holds rows
    s * G + (m * dp_degree + r) * b + [0, b), with b = ``local_batch_size``.

    Raises ConfigError where G is no multiple of b * dp_degree.
    """

    global_batch_size: int
    local_batch_size: int
    dp_rank: int
    dp_degree: int

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
        return step * self.global_batch_size + (micro_batch * self.dp_degree + self.dp_rank) * self.local_batch_size

    def streams(self, n_streams: int) -> list[int]:
        """The streams (row number mod ``n_streams``) of this rank, in the order of its rows; a multiple of G of them."""
        steps = n_streams // self.global_batch_size
        firsts = [self.first_row(step, m) for step in range(steps) for m in range(self.accumulation_steps)]
        return [first + i for first in firsts for i in range(self.local_batch_size)]
