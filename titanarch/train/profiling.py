"""The section [profiling]: torch profiler traces and CUDA memory snapshots, written into the run folder."""

import pickle
from pathlib import Path
from types import TracebackType

import torch
from pydantic import Field, model_validator
from torch.profiler import ProfilerActivity, profile, schedule

from titanarch.config.errors import ConfigError, Problem
from titanarch.config.section import Section
from titanarch.train.metrics.files import writing

SNAPSHOT_EVENTS = 100_000
"""Allocator events kept for a snapshot; the oldest go first."""


class ProfilingConfig(Section, identity=False):
    """Traces of where time goes, snapshots of where memory goes."""

    enable_profiling: bool = Field(False, description="write torch profiler traces")
    save_traces_folder: str = Field("profile_traces", description="folder of the traces, inside the run folder", min_length=1)
    profile_freq: int = Field(10, description="steps between traces, and between memory snapshots", ge=1)
    profiler_warmup: int = Field(
        3, description="steps before a trace in which the profiler runs unrecorded, so that its start-up is left out", ge=0
    )
    profiler_active: int = Field(1, description="steps that a trace holds", ge=1)
    enable_memory_snapshot: bool = Field(False, description="write CUDA memory snapshots, one more when memory runs out")
    save_memory_snapshot_folder: str = Field("memory_snapshot", description="folder of the snapshots, inside the run folder", min_length=1)

    @model_validator(mode="after")
    def _trace_fits(self) -> "ProfilingConfig":
        needed = self.profiler_warmup + self.profiler_active
        if self.enable_profiling and self.profile_freq < needed:
            raise ValueError(f"profile_freq is {self.profile_freq}, less than profiler_warmup + profiler_active = {needed}: raise it")
        return self


def check_profiling(config: ProfilingConfig, *, device_type: str) -> None:
    """Before launch: ConfigError where the device (``cuda`` or ``cpu``) cannot do what is asked."""
    if config.enable_memory_snapshot and device_type != "cuda":
        raise ConfigError(
            Problem(
                f"memory snapshots are of the CUDA allocator, and this run trains on {device_type}: "
                "set it to false; memory_gib in the metrics is the process's own",
                key="profiling.enable_memory_snapshot",
            )
        )


class Profiler:
    """Wraps the training loop: ``with Profiler(...) as profiler: ... profiler.step()`` after every step.

    Every process writes its own: ``<folder>/step-00000010/rank0_trace.json.gz`` (chrome://tracing, Perfetto) and
    ``rank0_snapshot.pickle`` (pytorch.org/memory_viz), named by the last step they hold. Switched off, ``step`` does nothing.
    """

    def __init__(self, config: ProfilingConfig, run_dir: Path, *, rank: int, device: torch.device, start_step: int) -> None:
        self._config = config
        self._traces = run_dir / config.save_traces_folder
        self._snapshots = run_dir / config.save_memory_snapshot_folder
        self._rank = rank
        self._step = start_step
        self._steps_here = 0
        self._traced = 0
        self._profile = self._make_profile(device) if config.enable_profiling else None
        self._is_on = config.enable_profiling or config.enable_memory_snapshot

    def __enter__(self) -> "Profiler":
        if self._config.enable_memory_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)
        if self._profile is not None:
            self._profile.start()
        return self

    def step(self) -> None:
        """A training step has ended. Raises ConfigError where a file cannot be written."""
        if not self._is_on:
            return
        self._step += 1
        self._steps_here += 1
        if self._profile is not None:
            self._profile.step()
        if self._config.enable_memory_snapshot and self._steps_here % self._config.profile_freq == 0:
            self._write_snapshot(f"step-{self._step:08}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._profile is not None:
            self._profile.stop()
        if self._config.enable_memory_snapshot:
            if isinstance(error, torch.OutOfMemoryError):
                self._write_snapshot(f"step-{self._step + 1:08}-out-of-memory")
            torch.cuda.memory._record_memory_history(enabled=None)

    def _make_profile(self, device: torch.device) -> profile:
        warmup, active = self._config.profiler_warmup, self._config.profiler_active
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        wait = self._config.profile_freq - warmup - active
        return profile(
            activities=activities,
            schedule=schedule(wait=wait, warmup=warmup, active=active),
            on_trace_ready=self._write_trace,
            record_shapes=True,
        )

    def _write_trace(self, recorded: profile) -> None:
        if self._steps_here % self._config.profile_freq != 0 or self._steps_here == self._traced:
            return  # the loop ended inside a recording: part of a trace would pass for a whole one
        self._traced = self._steps_here
        path = self._traces / f"step-{self._step:08}" / f"rank{self._rank}_trace.json.gz"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(path))

    def _write_snapshot(self, name: str) -> None:
        path = self._snapshots / name / f"rank{self._rank}_snapshot.pickle"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                pickle.dump(torch.cuda.memory._snapshot(), file)
