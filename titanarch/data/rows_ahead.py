"""Rows of the next step, read before it begins, so that all ranks find out beforehand whether the step can be had."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from titanarch.config.errors import ConfigError
from titanarch.data.mixed_streams import MixedStreamRow, SourceEnded


class RowsAhead:
    """This rank's rows of one step, up to the first that cannot be had. ``names``: of the sources.

    What is wrong with that row is raised when it is taken, so that what comes before it can be saved. ``lacking`` says which it is and
    which source has ended with it, in one number, of which the least of all ranks is that of the first row of the run; inf where all
    rows can be had.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._rows: deque[MixedStreamRow | ConfigError] = deque()
        self.lacking = math.inf

    def __len__(self) -> int:
        """Rows, and what is wrong with one, that were not taken."""
        return len(self._rows)

    def look(self, rows: Iterable[int], read: Callable[[int], MixedStreamRow]) -> None:
        """Read ``rows``, numbers of the run in ascending order, where those of the step before are taken."""
        assert not self._rows, "rows of a step are taken before those of the next are read"
        self.lacking = math.inf
        for row in rows:
            try:
                self._rows.append(read(row))
            except ConfigError as error:
                self._rows.append(error)
                source = error.source if isinstance(error, SourceEnded) else len(self._names)
                self.lacking = float(row * (len(self._names) + 1) + source)
                return

    def take(self) -> MixedStreamRow:
        """The next row; raises what is wrong with it, as often as it is asked for."""
        row = self._rows[0]
        if isinstance(row, ConfigError):
            raise row
        self._rows.popleft()
        return row

    def clear(self) -> None:
        """Forget all of them."""
        self._rows.clear()
        self.lacking = math.inf

    def why(self, lacking: float) -> str:
        """Why the data end at ``lacking``; empty where they do not, or the row is wrong in another way, which its rank will raise."""
        if lacking == math.inf:
            return ""
        row, source = divmod(int(lacking), len(self._names) + 1)
        return "" if source == len(self._names) else SourceEnded(row, source, self._names[source]).problems[0].message
