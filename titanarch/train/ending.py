"""Whether a run makes another step: until its budget is spent, it was told to end, or its data do not last for one."""

from titanarch.train.budget import Budget
from titanarch.train.metrics.meter import StepMeter
from titanarch.train.progress import DataState
from titanarch.train.stopping import Stopping


class Ending:
    """What ends the loop, alike on all processes."""

    def __init__(self, budget: Budget, stopping: Stopping, data: DataState, meter: StepMeter) -> None:
        """``meter`` counts the wait for rows."""
        self._budget, self._stopping, self._data, self._meter = budget, stopping, data, meter
        self.data_ended = ""
        """Why the data do not last for the next step; empty where they do, or where none is made anyway."""

    @property
    def is_here(self) -> bool:
        """Whether no step is left to make."""
        return self._budget.done or bool(self._stopping.signal or self.data_ended)

    def look_ahead(self) -> None:
        """Find out whether the next step can be had; before the first one, and after each once ``Stopping`` has agreed. Collective."""
        with self._meter.waiting():
            self._data.exchange()
            if not self.is_here:
                self.data_ended = self._data.loader.ended_for_all(self._stopping.least)
