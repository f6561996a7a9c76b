"""The run: build, resume, loop, validate, evaluate, write the result."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from titanarch.checkpoint.store import Checkpointer
from titanarch.checkpoint.train_state import ModelState, OptimizerState, RandomState
from titanarch.config.dump import dump_toml, to_table
from titanarch.config.errors import ConfigError
from titanarch.contract.model import MODELS
from titanarch.data.batch import Batch
from titanarch.data.ledger import Ledger, LedgerHeader
from titanarch.data.loader import build_loader
from titanarch.data.tokenizers import build_tokenizer
from titanarch.train.bad_reports import StepRows
from titanarch.train.budget import build_budget
from titanarch.train.check import vocabulary
from titanarch.train.ending import Ending
from titanarch.train.epochs import check_next_step, data_counts, epochs_done, planned_epochs
from titanarch.train.gradients import GradientClipper, LossScaler
from titanarch.train.guard import BadGradientError, BadStep, GradientGuard
from titanarch.train.held_out import HeldOut
from titanarch.train.metrics.devices import device_peak
from titanarch.train.metrics.environment import environment_record
from titanarch.train.metrics.log import MetricLog
from titanarch.train.metrics.meter import StepMeter
from titanarch.train.metrics.rows import Trimmed
from titanarch.train.metrics.sink import SinkContext
from titanarch.train.optimizers import build_optimizers
from titanarch.train.processes import Processes, set_timeout
from titanarch.train.profiling import Profiler
from titanarch.train.progress import DataState, Progress
from titanarch.train.recovery import Recovery
from titanarch.train.reproducibility import GarbageCollection, seed_global_generators, set_deterministic
from titanarch.train.resolve import local_batch_size, param_dtype
from titanarch.train.result import sizes, training_flops
from titanarch.train.run_config import RunConfig
from titanarch.train.run_folder import RunFolder
from titanarch.train.schedules import build_schedule
from titanarch.train.setup import build_model, checkpoint_location
from titanarch.train.step import StepOutcome, TrainStep
from titanarch.train.stopping import Stopping, ToldToEnd
from titanarch.train.watchdog import StepWatchdog


class Trainer:
    """One start of a run. ``config`` is resolved; ``folder`` is open on process 0 and only read on others."""

    def __init__(self, config: RunConfig, processes: Processes, folder: RunFolder) -> None:
        training, seed = config.training, config.debug.seed
        assert seed is not None, "the configuration is resolved before anything is built"
        self.config, self.processes, self.folder = config, processes, folder
        set_deterministic(config.debug.deterministic, processes.device.type)
        seed_global_generators(seed)
        self.tokenizer = build_tokenizer(config.data.tokenizer)
        vocab_size = vocabulary(config, self.tokenizer.vocab_size)
        built = build_model(config, processes, vocab_size)
        self.model, self.mesh, self.division, self.cost, self.notes = built.model, built.mesh, built.division, built.cost, built.notes
        self.phases = training.run_phases(self.mesh.degrees.data_parallel)
        self.flops_per_token = {
            phase.seq_len: MODELS.of(config.model).cost(config.model, vocab_size, phase.seq_len).training_flops_per_token
            for phase in self.phases.parts
        }
        self.optimizers = build_optimizers(config.optimizer, self.model.named_parameters(), built.roles, built.growth)
        self.loader = build_loader(
            config.data,
            tokenizer=self.tokenizer,
            seq_len=training.seq_len,
            global_batch_size=training.global_batch_size,
            local_batch_size=self.rows_at_once,
            dp_rank=self.mesh.data_rank,
            dp_degree=self.mesh.degrees.data_parallel,
            seed=seed,
            earlier=self.phases.parts[:-1],
        )
        self.scaler = LossScaler(enabled=training.mixed_precision_param == "float16")
        self.guard = GradientGuard(config.bad_gradients, self.scaler)
        self.train_step = TrainStep(
            self.model,
            self.optimizers,
            clipper=GradientClipper(self.model.parameters(), training.max_norm),
            scaler=self.scaler,
            guard=self.guard,
            mesh=self.mesh,
            device=processes.device,
            seed=seed,
            z_weight=training.z_loss_weight,
        )
        self.tokens_per_step = self.phases.parts[0].tokens_per_step
        self.budget = build_budget(steps=training.steps, tokens=training.tokens, minutes=training.minutes, phases=self.phases)
        self.schedule = build_schedule(config.lr_scheduler, self.budget)
        self.log = MetricLog(config.metrics, is_main=processes.is_main)
        self.checkpointer = Checkpointer(config.checkpoint, folder.path)
        self.data = DataState(self.loader, self.checkpointer)
        self.progress = Progress(budget=self.budget, train_step=self.train_step, checkpointer=self.checkpointer)
        self.recovery = Recovery(
            config.bad_gradients,
            self.train_step,
            data=self.data,
            tokenizer=self.tokenizer,
            log=self.log,
            processes=self.checkpointer.processes,
            folder=folder.path,
            checkpoints=checkpoint_location(folder.path, config.checkpoint),
            verify=config.checkpoint.verify,
        )
        self.meter = StepMeter(
            device=processes.device,
            n_devices=processes.world_size,
            training_flops_per_token=self.flops_per_token[self.phases.parts[0].seq_len],
            peak_flops_per_second=device_peak(processes.device, param_dtype(config), tf32=False),
            sum_over_processes=processes.sum,
        )
        self.watchdog = StepWatchdog(config.comm, processes.watch, folder.path)
        self.stopping = Stopping(processes.watch)
        self.ending = Ending(self.budget, self.stopping, self.data, self.meter)
        self.held_out = HeldOut(
            config, self.model, tokenizer=self.tokenizer, mesh=self.mesh, device=processes.device, rows_at_once=self.rows_at_once
        )
        self.ledger: Ledger | None = None

    @property
    def rows_at_once(self) -> int:
        return local_batch_size(self.config, self.mesh.degrees.data_parallel)

    def run(self) -> dict[str, Any]:
        """Train to the end of the budget; the result, also written to the folder by process 0. ToldToEnd where a signal came before."""
        started = time.monotonic()
        with ExitStack() as stack:
            stack.callback(self.log.close)
            stack.callback(self.checkpointer.close)
            stack.callback(self.loader.close)
            stack.enter_context(self.processes.watch.explained())  # before the others are waited for in what closes
            stack.enter_context(self.watchdog)
            first_step = self._resume()
            if self.config.data.ledger:
                self.ledger = self._open_ledger()
                stack.callback(self.ledger.close)
            self.budget.start(self.progress.step, self.progress.tokens)
            finished = self.folder.read_result() if self.budget.done else None
            if finished is not None:
                self.log.event(f"the run in {self.folder.path} has finished, at step {first_step}: there is nothing left to train")
                return finished
            self.log.event(planned_epochs(self.loader, self.budget, allowed=self.config.data.allow_repeat))
            if self.processes.is_main:
                self.folder.set_aside_result()
            for note in self.notes:
                self.log.event(note)
            self.meter.start(self.budget.fraction)
            rank, device = self.processes.rank, self.processes.device
            profiler = Profiler(self.config.profiling, self.folder.path, rank=rank, device=device, start_step=first_step)
            stack.enter_context(profiler)
            garbage = stack.enter_context(GarbageCollection(self.config.training.gc_freq))
            with self.stopping:
                try:
                    self._loop(profiler.step, garbage.after_step)
                except BadGradientError as error:
                    with self.watchdog.paused():
                        self.recovery.report(error.bad)
                    raise
                losses = self._validate() if self.budget.done or not self.stopping.signal else {}
                if self.stopping.ask():
                    self._end_early(first_step)
                if self.config.checkpoint.last_save and self.progress.step > first_step:
                    self._save_last()
            result = self._result(losses, started)
            if self.processes.is_main:
                self.folder.write_result(result)
            with self.watchdog.saving(self.progress.step):
                self.checkpointer.wait()
            self._log_saved()
            self.log.close(result)
        return result

    def _loop(self, profile: Callable[[], None], collect_garbage: Callable[[int], None]) -> None:
        batches = self.meter.timed(self.loader)
        first_step = self.progress.step + 1
        self.ending.look_ahead()
        while not self.ending.is_here:
            step = self.progress.step + 1
            self._refuse_repeats(saves=step > first_step)
            self.watchdog.begin(step)
            if not self.stopping.told:  # a signal to all processes ends the one that uploads too, which _end_early makes good
                self.checkpointer.maybe_wait()
            self._log_saved()
            drawn = self.draw(batches)
            outcome = self.train_step(step, drawn)
            if self.ledger is not None:
                self.ledger.step(step, drawn, made=outcome.is_made)
            bad = self.guard.bad
            if bad is not None and bad.action == "roll_back":
                with self.watchdog.paused():
                    self._roll_back(bad)
                self.ending.look_ahead()
                continue
            self.advance()
            self.stopping.agreed()
            self.ending.look_ahead()
            self.processes.watch.finished(step)
            scalars, parts = {"grad_norm": outcome.grad_norm}, {"loss": outcome.loss, **outcome.parts}
            self.meter.step_done(self.tokens_per_step, *((scalars, parts) if bad is None else ({}, {})))  # means are over steps made
            self._after_step(step, outcome)
            self.watchdog.end()
            if step == first_step:
                set_timeout(self.config.comm.train_timeout_seconds)
            profile()
            collect_garbage(step)
        if self.ending.data_ended:
            self.log.event(f"the run ends before step {self.progress.step + 1}: {self.ending.data_ended}")

    def _refuse_repeats(self, *, saves: bool) -> None:
        """Where the next step may not be made, raise after a checkpoint to go on from."""
        try:
            check_next_step(self.loader, self.budget, allowed=self.config.data.allow_repeat)
        except ConfigError:
            if self.config.checkpoint.last_save and saves:
                self._save_last()
            raise

    def draw(self, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of the next step, for which the learning rate is set."""
        step, first_row, phase = self.progress.step + 1, self.loader.next_row, self.loader.phase
        self.tokens_per_step = phase.tokens_per_step
        self.meter.training_flops_per_token = self.flops_per_token[phase.seq_len]
        self.optimizers.set_lr(self.schedule.factor(step - 1, self.budget.fraction))
        drawn = [next(batches) for _ in range(self.loader.accumulation_steps)]
        self.recovery.drawn(StepRows(step, first_row, self.loader.next_row - 1), drawn)
        return drawn

    def advance(self) -> None:
        """The next step is done."""
        self.progress.step, self.progress.tokens = self.progress.step + 1, self.progress.tokens + self.tokens_per_step
        self.budget.advance(self.progress.step, self.progress.tokens)

    def _after_step(self, step: int, outcome: StepOutcome) -> None:
        """Log, validate, save: rows come before the checkpoint that a resume would find them with."""
        if self.guard.bad is not None:
            with self.meter.paused(), self.watchdog.paused():
                self.recovery.refused(self.guard.bad, tokens=self.progress.tokens)
        elif not outcome.is_made:
            self.log.event(f"step {step}: the update was skipped, its gradient norm is {outcome.grad_norm.item()}")
        is_last = self.ending.is_here
        if self.config.metrics.is_logged(step) or is_last:
            self.guard.check()
            row = self.meter.row(step, tokens=self.progress.tokens, fraction=self.budget.fraction)
            counts = {"lr": self.optimizers.lr, "skipped_steps": self.guard.skipped + self.scaler.overflows}
            self.log.log({**row, **counts, **data_counts(self.loader)})
        if self._validates(step) and not is_last:
            self._validate()
        if self.checkpointer.due(step) and not is_last:
            self._save(last=False)

    def _validates(self, step: int) -> bool:
        return self.config.validation.enable and step % self.config.validation.interval == 0

    def _end_early(self, first_step: int) -> NoReturn:
        """Save what is not saved yet, and raise ToldToEnd. ``first_step``: which this start went on from."""
        with self.watchdog.saving(self.progress.step):
            failure = self.checkpointer.wait_for_all()
        if failure:
            self.log.event(f"the last checkpoint failed, and the state is saved again: {failure}")
        if failure or self.recovery.good_step != self.progress.step:
            self._save(last=True)
        self._log_saved()
        if self._validates(self.progress.step) and self.progress.step > first_step:
            self._validate()  # late, since whoever told the run to end may wait for no more than the checkpoint
            self._save_last()
        raise ToldToEnd(self.stopping.signal, self.progress.step, saves=self.config.checkpoint.enable, speaks=self.processes.is_main)

    def _roll_back(self, bad: BadStep) -> None:
        """Back to the last good checkpoint, and on with the rows after those of ``bad``."""
        self.recovery.refused(bad, tokens=self.progress.tokens)
        spent = self.budget.state_dict()
        self.recovery.roll_back(self.state(), self.checkpointer.wait)
        self.budget.load_state_dict(spent)
        self.budget.roll_back(self.progress.step, self.progress.tokens)
        self.held_out.forget()
        if self.ledger is not None:
            self.ledger.rolled_back(self.progress.step)
        self.log.close()
        if self.processes.is_main:
            self._open_log()
        self.recovery.rolled_back(bad, step=self.progress.step + 1, tokens=self.progress.tokens)
        self.meter.start(self.budget.fraction)

    def _validate(self) -> dict[str, float]:
        """Losses on the fixed rows, measured once after a step, and logged; {} where validation is off."""
        step = self.progress.step
        losses = self.held_out.losses_after(step)
        if self.held_out.validation_sets and not losses:
            with self.meter.paused(), self.budget.stopwatch.paused(), self.watchdog.validating(step):
                losses = self.held_out.validate(step)
            self.log.log({"step": step, "tokens": self.progress.tokens, **losses})
        return losses

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the run."""
        return {
            "model": ModelState(self.model),
            "optimizer": OptimizerState(self.model, self.optimizers.torch_optimizers),
            "data": self.data,
            "progress": self.progress,
            "random": RandomState(self.checkpointer.processes),
        }

    def _save_last(self) -> None:
        """Save, but where that was done after this step: then its checkpoint is told the loss that was measured since."""
        step = self.progress.step
        if self.recovery.good_step != step:
            self._save(last=True)
        elif (loss := self.held_out.losses_after(step).get("validation_loss")) is not None:
            with self.watchdog.saving(step):
                self.checkpointer.note_loss(step, loss)

    def _save(self, *, last: bool) -> None:
        """A checkpoint of the last step, with the validation loss that was measured after it."""
        self.guard.check()
        if self.ledger is not None:
            self.ledger.sync()
        loss = self.held_out.losses_after(self.progress.step).get("validation_loss")
        with self.meter.paused(), self.budget.stopwatch.paused(), self.watchdog.saving(self.progress.step):
            text = dump_toml(self.config)
            self.checkpointer.save(self.progress.step, self.state(), config_text=text, validation_loss=loss, force_sync=last)
        self.recovery.good_step = self.progress.step
        self._log_saved()

    def _log_saved(self) -> None:
        """A row and a sentence for each save that is committed by now; the row's step is that of the checkpoint."""
        for saved in self.checkpointer.take_saved():
            self.log.log({"step": saved.step, **saved.seconds})
            self.log.event(str(saved))

    def _resume(self) -> int:
        """Load the newest checkpoint, or the initial weights; open the sinks. The step that training goes on from."""
        self.checkpointer.claim()
        loaded = self.checkpointer.load(self.state())
        initial = None if loaded else self.checkpointer.load_initial(self.state())
        step = self.recovery.good_step = self.progress.step
        if self.processes.is_main:
            trimmed = self._open_log()
            if loaded:
                self.log.event(f"resumed from {loaded.path} at step {step}{'; ' + str(trimmed) if str(trimmed) else ''}")
                for reason in loaded.skipped:
                    self.log.event(f"skipped the checkpoint {reason}")
            elif initial:
                self.log.event(f"started from the weights of {initial.path} (step {initial.step})")
        if self.recovery.needs_checkpoint and loaded is None:
            self._save(last=False)
        return step

    def _open_ledger(self) -> Ledger:
        """This process's file of the ledger. Collective: process 0 numbers the starts."""
        start, degrees = self.checkpointer.processes.from_first(lambda: self.folder.start_number), self.mesh.degrees
        header = LedgerHeader(
            start=start,
            after_step=self.progress.step,
            process=self.processes.rank,
            n_processes=self.processes.world_size,
            data_rank=self.mesh.data_rank,
            data_parallel=degrees.data_parallel,
            micro_batch=self.rows_at_once,
            workers=self.config.data.workers,
            origins=self.loader.origins,
        )
        return Ledger(self.folder.path, header)

    def _open_log(self) -> Trimmed:
        """Set the rows of later steps aside, and open the sinks. On process 0."""
        step = self.progress.step
        trimmed = self.folder.resume_at(step)
        self.log.open(SinkContext(self.folder.path, self.folder.path.name, step, self.budget.total_steps, to_table(self.config)))
        return trimmed

    def _result(self, losses: dict[str, float], started: float) -> dict[str, Any]:
        """``started``: the monotonic clock at the start, seconds."""
        with self.meter.paused():
            evaluation = self.held_out.evaluate()
        return {
            "run": str(self.folder.path),
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "epochs": epochs_done(self.loader),
            **({"source_epochs": epochs} if (epochs := self.loader.source_epochs) else {}),
            **sizes(self.cost),
            "training_flops": training_flops(self.phases, self.loader.next_row, self.progress.tokens, self.flops_per_token),
            "skipped_steps": self.guard.skipped + self.scaler.overflows,
            **self.meter.totals(),
            "wall_seconds": time.monotonic() - started,
            "losses": {name.removesuffix("_loss"): value for name, value in losses.items()},
            **evaluation,
            "environment": environment_record(device=self.processes.device, n_processes=self.processes.world_size),
        }


def run_path(config: RunConfig) -> Path:
    """The folder of the run."""
    return Path(config.job.dump_folder).expanduser()
