"""What a run does about a step that the guard refuses: the log, the report, and the way back to a checkpoint."""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from titanarch.checkpoint.config import Verification
from titanarch.checkpoint.loading import State
from titanarch.checkpoint.processes import Processes
from titanarch.checkpoint.store import load
from titanarch.data.batch import Batch
from titanarch.data.tokenizers import Tokenizer
from titanarch.train.bad_reports import BadStepReports, StepRows
from titanarch.train.guard import MOST_UNCHECKED_STEPS, BadGradientsConfig, BadStep
from titanarch.train.metrics.log import MetricLog
from titanarch.train.progress import DataState
from titanarch.train.step import TrainStep


class Recovery:
    """Of one start of a run. ``drawn`` is told of every step's rows; all other calls cost something only when they come."""

    def __init__(
        self,
        config: BadGradientsConfig,
        train_step: TrainStep,
        *,
        data: DataState,
        tokenizer: Tokenizer,
        log: MetricLog,
        processes: Processes,
        folder: Path,
        checkpoints: str,
        verify: Verification,
    ) -> None:
        """``processes``: the training thread's. ``folder``: of the run. ``checkpoints``: where they lie; ``verify``: see [checkpoint]."""
        self._config, self._guard, self._data, self._log = config, train_step.guard, data, log
        self._processes, self._checkpoints, self._verify = processes, checkpoints, verify
        self._reports = BadStepReports(folder, train_step, tokenizer, processes)
        self._recent: deque[StepRows] = deque(maxlen=MOST_UNCHECKED_STEPS + 1)
        self._batches: Sequence[Batch] = ()
        self.good_step = 0
        """The step of the checkpoint that this start loaded or saved last."""

    @property
    def needs_checkpoint(self) -> bool:
        """Whether a bad step may send the run back."""
        return "roll_back" in (self._config.nonfinite, self._config.spike)

    @property
    def last_rows(self) -> StepRows:
        """Of the step that was drawn last."""
        return self._recent[-1]

    def drawn(self, rows: StepRows, batches: Sequence[Batch]) -> None:
        """The next step is made of ``rows``, of which this process has ``batches``."""
        self._recent.append(rows)
        self._batches = batches

    def refused(self, bad: BadStep, *, tokens: int) -> None:
        """``bad`` is not made: report and log it. Collective. ``tokens``: of the run, as the row gives them."""
        self.report(bad)
        what = "the run is rolled back" if bad.action == "roll_back" else "the update was skipped"
        self._log.event(f"{bad}: {what}")
        if bad.action == "skip":
            self._log.log({"step": bad.step, "tokens": tokens, **self._numbers(bad)})

    def report(self, bad: BadStep) -> None:
        """Write the report where it is wanted, before anything is changed. Collective where ``bad.is_shared``."""
        if not self._config.report:
            return
        path = self._reports.write(bad, self._rows_of(bad.step), self._batches)
        if path is not None:
            self._log.event(f"step {bad.step}: reported in {path}")

    def roll_back(self, state: State, wait: Callable[[], None]) -> None:
        """Load the last good checkpoint into ``state``, but for the rows, which go on after those drawn last. Collective.

        The count of roll-backs is that of the run. ``wait``: returns when pending checkpoints are committed.
        """
        n_roll_backs, next_row = self._guard.roll_backs, self._data.loader.next_row
        wait()
        loaded = load(self._checkpoints, state, step=self.good_step, how=self._verify, processes=self._processes)
        assert loaded is not None, "a chosen step is there, or raises"
        self._guard.roll_backs = n_roll_backs
        self._data.pass_rows(next_row)

    def rolled_back(self, bad: BadStep, *, step: int, tokens: int) -> None:
        """Log that the run went back from ``bad`` and goes on with ``step``; the rows of later steps are set aside by now."""
        self._log.event(f"went back from step {bad.step} to the checkpoint of step {step - 1}, past the rows until then")
        self._log.log({"step": step, "tokens": tokens, "rolled_back_from": bad.step, **self._numbers(bad)})

    def _numbers(self, bad: BadStep) -> dict[str, float | int]:
        rows = self._rows_of(bad.step)
        assert rows is not None, "the step is the last one"
        return {
            "skipped_norm": bad.norm,
            "skipped_threshold": bad.threshold,
            "skipped_first_row": rows.first,
            "skipped_last_row": rows.last,
        }

    def _rows_of(self, step: int) -> StepRows | None:
        return next((rows for rows in reversed(self._recent) if rows.step == step), None)
