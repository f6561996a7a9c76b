"""The trainer of a run, stopped and continued at will, so that its steps can be timed between those of another program."""

from contextlib import ExitStack

from titanarch.train.profiling import Profiler
from titanarch.train.reproducibility import GarbageCollection
from titanarch.train.trainer import Trainer


class SlicedTrainer(Trainer):
    """The trainer, some steps at a time."""

    def open(self, stack: ExitStack) -> None:
        """All that ``run`` does before its loop."""
        for close in (self.log.close, self.checkpointer.close, self.loader.close):
            stack.callback(close)
        self._resume()
        self.budget.start(self.progress.step, self.progress.tokens)
        self.meter.start(self.budget.fraction)
        profiling, device = self.config.profiling, self.processes.device
        self._profiler = stack.enter_context(Profiler(profiling, self.folder.path, rank=0, device=device, start_step=0))
        self._garbage = stack.enter_context(GarbageCollection(self.config.training.gc_freq))

    def steps(self, n: int) -> None:
        """``n`` turns of the loop as it is."""
        end, collect = self.progress.step + n, self._garbage.after_step

        def after_step(step: int) -> None:
            collect(step)
            self.budget.done = step == end

        self.budget.done = False
        self._loop(self._profiler.step, after_step)

    def losses(self) -> dict[str, float]:
        """Now, on the fixed rows of ``[validation]``."""
        return self._validate()
