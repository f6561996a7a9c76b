"""Profiler traces on the CPU, and what is refused before launch."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from titanarch.config.errors import ConfigError
from titanarch.train.profiling import Profiler, ProfilingConfig, check_profiling

CPU = torch.device("cpu")


def traces(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize(("warmup", "active"), [(1, 2), (0, 4)])
@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
def test_a_trace_every_profile_freq_steps_holds_the_active_steps(tmp_path: Path, warmup: int, active: int) -> None:
    config = ProfilingConfig(enable_profiling=True, profile_freq=4, profiler_warmup=warmup, profiler_active=active, save_traces_folder="t")
    x = torch.ones(8, 8)
    with Profiler(config, tmp_path, rank=3, device=CPU, start_step=100) as profiler:
        for _ in range(9 if warmup else 8):
            torch.mm(x, x)
            profiler.step()
    assert traces(tmp_path) == ["t/step-00000104/rank3_trace.json.gz", "t/step-00000108/rank3_trace.json.gz"]
    for path in traces(tmp_path):
        with gzip.open(tmp_path / path, "rt") as file:
            events = json.load(file)["traceEvents"]
        assert sum(event.get("name") == "aten::mm" for event in events) == active


def test_a_loop_that_ends_inside_a_recording_writes_no_part_of_a_trace(tmp_path: Path) -> None:
    config = ProfilingConfig(enable_profiling=True, profile_freq=4, profiler_warmup=0, profiler_active=4)
    with pytest.warns(UserWarning, match="warmup"), Profiler(config, tmp_path, rank=0, device=CPU, start_step=0) as profiler:
        profiler.step()
    assert traces(tmp_path) == []


def test_switched_off_it_writes_nothing(tmp_path: Path) -> None:
    with Profiler(ProfilingConfig(), tmp_path, rank=0, device=CPU, start_step=0) as profiler:
        for _ in range(30):
            profiler.step()
    assert traces(tmp_path) == []
    check_profiling(ProfilingConfig(enable_profiling=True), device_type="cpu")


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"\[profiling\] enable_memory_snapshot: .*trains on cpu: set it to false"):
        check_profiling(ProfilingConfig(enable_memory_snapshot=True), device_type="cpu")
    check_profiling(ProfilingConfig(enable_memory_snapshot=True), device_type="cuda")
    with pytest.raises(ValueError, match="profile_freq is 3, less than profiler_warmup \\+ profiler_active = 4"):
        ProfilingConfig(enable_profiling=True, profile_freq=3)
    assert not ProfilingConfig.is_identity("profile_freq")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory snapshots are of the CUDA allocator")
def test_memory_snapshots_on_a_gpu(tmp_path: Path) -> None:
    config = ProfilingConfig(enable_memory_snapshot=True, profile_freq=2)
    device = torch.device("cuda", 0)

    def train_until_memory_runs_out() -> None:
        with Profiler(config, tmp_path, rank=0, device=device, start_step=0) as profiler:
            for _ in range(3):
                torch.ones(1000, device=device)
                profiler.step()
            torch.empty(2**50, device=device)

    with pytest.raises(torch.OutOfMemoryError):
        train_until_memory_runs_out()
    assert traces(tmp_path) == [
        "memory_snapshot/step-00000002/rank0_snapshot.pickle",
        "memory_snapshot/step-00000004-out-of-memory/rank0_snapshot.pickle",
    ]
