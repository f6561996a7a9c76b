"""A traced step against closed formulas, against counts by hand, and against a real run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed
from tests.plan.conftest import Configure, small_config
from titanarch.config.load import load_config
from titanarch.contract.model import MODELS
from titanarch.plan.fit import vocab_size_of
from titanarch.plan.ledger import GRADIENTS, OPTIMIZER, PARAMETERS, Ledger
from titanarch.plan.trace import StepTrace, axis_names, synthetic_batch, trace_step
from titanarch.train.gradients import GradientClipper, LossScaler
from titanarch.train.guard import BadGradientsConfig, GradientGuard
from titanarch.train.optimizers import build_optimizers
from titanarch.train.processes import Processes
from titanarch.train.resolve import local_batch_size, resolve
from titanarch.train.run_config import RunConfig
from titanarch.train.setup import build_model
from titanarch.train.step import TrainStep

TP, CP, REPLICATE = (f"parallelism.{name}_degree" for name in ("tensor_parallel", "context_parallel", "data_parallel_replicate"))
METHOD = "parallelism.context_parallel_method"


def trace(config: RunConfig, world_size: int, device_type: str = "cpu") -> StepTrace:
    return trace_step(config, vocab_size_of(config), world_size=world_size, device_type=device_type)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (16, {TP: 2, CP: 2, REPLICATE: 2, "training.local_batch_size": 1, "activation_checkpoint.mode": "full"}),
        (2, {TP: 2, "parallelism.enable_sequence_parallel": "false"}),
        (2, {CP: 2, METHOD: "heads"}),
        (4, {CP: 4, METHOD: "ring", "training.mixed_precision_param": "bfloat16"}),
    ],
)
def test_traffic_is_what_the_closed_formulas_say(configure: Configure, world_size: int, changes: dict[str, Any]) -> None:
    found = trace(configure(changes), world_size)
    assert found.formulas, "there is an axis to compare"
    for axis, formula in found.formulas.items():
        assert formula is not None
        assert found.sent_bytes(axis) == pytest.approx(formula, rel=0.01), axis


def test_states_are_counted_exactly(configure: Configure) -> None:
    config = configure({})
    cost = MODELS.of(config.model).cost(config.model, vocab_size_of(config), config.training.seq_len)
    found = trace(config, 1)
    assert found.state_bytes[PARAMETERS] == 4 * cost.parameters
    assert found.state_bytes[OPTIMIZER] == pytest.approx(8 * cost.parameters, rel=1e-3)  # and a number of steps a parameter
    assert found.peak.by_category[PARAMETERS] == 4 * cost.parameters
    assert found.peak.by_category[OPTIMIZER] == found.state_bytes[OPTIMIZER]


def test_sharding_divides_states_and_accumulation_keeps_whole_gradients(configure: Configure) -> None:
    config = configure({"training.local_batch_size": 1})
    cost = MODELS.of(config.model).cost(config.model, vocab_size_of(config), config.training.seq_len)
    accumulated = trace(config, 4)
    assert accumulated.n_micro_batches == 2
    assert accumulated.state_bytes[PARAMETERS] == pytest.approx(4 * cost.parameters / 4, rel=0.01)
    assert accumulated.peak.by_category[GRADIENTS] > 0.9 * 4 * cost.parameters


def test_on_cuda_the_cpus_small_routes_are_not_taken(configure: Configure) -> None:
    """A mask of all pairs, one a layer, is what the CPU keeps at this size and a GPU does not."""
    config = configure({"model.position.relative": "alibi", "training.seq_len": 256, "training.global_batch_size": 8})
    masks = 2 * 4 * 8 * 4 * 256 * 256  # layers, heads, rows
    on_cpu, on_cuda = trace(config, 1), trace(config, 1, "cuda")
    assert on_cpu.peak.total - on_cuda.peak.total > 0.8 * masks - 4 * 8 * 256 * 8192 * 3  # the loss takes larger chunks there


def test_recurrences_whose_kernels_are_for_cuda_are_traced_in_plain_pytorch(configure: Configure) -> None:
    peaks = []
    for backend in ("reference", "fla"):
        options = f"{{ gla = {{ backend = '{backend}' }}, mamba2 = {{ backend = '{backend}' }} }}"
        found = trace(configure({"model.layers": '["gla", "mamba2"]', "model.mixers": options}), 1, "cuda")
        peaks.append(found.peak.total)
        assert found.notes == ()
    assert peaks[0] == peaks[1]


CASES: tuple[dict[str, Any], ...] = ({TP: 2}, {CP: 2}, {"training.local_batch_size": 1, "activation_checkpoint.mode": "full"})


LONG = Path(__file__).resolve().parents[2] / "train_configs" / "long_context"
LONG_FILES = ("linear_cpb_64k_cpu",)


def cases(folder: Path) -> list[RunConfig]:
    """Small ones, and the small form of a long-context file, which divides its rows between two processes."""
    long = [resolve(load_config(LONG / f"{name}.toml", [], RunConfig).config, seed=0, device_type="cpu") for name in LONG_FILES]
    return [*(small_config(folder, changes) for changes in CASES), *long]


def _real_steps(folder: Path) -> list[dict[str, float]]:
    """Bytes sent by axis and the peak of a real second step, each case."""
    own = folder / str(dist.get_rank())
    own.mkdir()
    return [_real_step(config) for config in cases(own)]


def _real_step(config: RunConfig) -> dict[str, float]:
    with Ledger() as ledger:
        ledger.phase = "build"
        processes = Processes(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
        built = build_model(config, processes, vocab_size_of(config))
        optimizers = build_optimizers(config.optimizer, built.model.named_parameters(), built.roles, built.growth)
        scaler = LossScaler(enabled=False)
        clipper, guard = GradientClipper(built.model.parameters(), 1.0), GradientGuard(BadGradientsConfig(), scaler)
        step = TrainStep(
            built.model,
            optimizers,
            clipper=clipper,
            scaler=scaler,
            guard=guard,
            mesh=built.mesh,
            device=processes.device,
            seed=0,
            z_weight=0.0,
        )
        n_data = built.mesh.degrees.data_parallel
        rows = local_batch_size(config, n_data)
        n_batches = config.training.global_batch_size // (rows * n_data)
        batches = [synthetic_batch(rows, config.training.seq_len) for _ in range(n_batches)]
        step(1, batches)
        ledger.sent.clear()
        ledger.phase = "step"
        ledger.start_peak()
        step(2, batches)
    axes, sent = axis_names(built.mesh), {"peak": float(ledger.peak().total)}
    for (_, group, _), n_bytes in ledger.sent.items():
        axis = axes.get(group, "world")
        sent[axis] = sent.get(axis, 0.0) + n_bytes
    return sent


def test_a_real_run_sends_and_holds_what_its_trace_does(tmp_path: Path) -> None:
    real = run_distributed(_real_steps, 2, tmp_path, timeout_seconds=600.0)[0]
    for number, (config, found) in enumerate(zip(cases(tmp_path), real, strict=True)):
        traced = trace(config, 2)
        for axis, formula in traced.formulas.items():
            assert traced.sent_bytes(axis) == pytest.approx(found[axis], rel=1e-6), (number, axis)
            assert found[axis] == pytest.approx(formula, rel=0.01), (number, axis)
        assert traced.peak.total == pytest.approx(found["peak"], rel=0.1), number
