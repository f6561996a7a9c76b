"""torch.compile of each block: eager losses and gradients, and one graph that serves every later step."""

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed
from tests.parallel.steps import PLAIN, Case, Outcome, T, all_outcomes
from titanarch.contract.sequence import SequenceInfo
from titanarch.parallel.compile import as_packed

TRACED = {"enable": True, "backend": "aot_eager"}
DROPPED = {**PLAIN, "dropout": 0.1}
FP32_PARTS = {**PLAIN, "position": {"relative": "linear_cpb"}, "mixers": {"attention": {"sinks": True}}}
TP2, CP2 = {"tensor_parallel_degree": 2}, {"context_parallel_degree": 2}
FULL, SELECTIVE = {"mode": "full"}, {"mode": "selective"}

# Packed and unpacked rows take turns, so more than two steps are needed to see every kind of batch twice.
ONE_PROCESS = {
    "dropout": (Case(DROPPED), Case(DROPPED, compile=TRACED)),
    "checkpointing in full, fp32 parts in bfloat16": (
        Case(FP32_PARTS, dtype="bfloat16"),
        Case(FP32_PARTS, dtype="bfloat16", compile=TRACED, activation_checkpoint=FULL),
    ),
    "memory budget": (Case(), Case(compile=TRACED, activation_checkpoint={"mode": "memory_budget", "memory_budget": 0.3})),
}
TWO_PROCESSES = {
    "tensor parallelism, selective checkpointing": (
        Case(parallelism=TP2),
        Case(parallelism=TP2, compile=TRACED, activation_checkpoint=SELECTIVE),
    ),
    "context parallelism, head-tail": (Case(parallelism=CP2), Case(parallelism=CP2, compile=TRACED)),
}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Over all gradients, relative to the largest entry of each."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-3)).item() for name in b)


def check(compiled: Outcome, eager: Outcome, *, loss: float, gradient: float) -> None:
    assert compiled.losses == pytest.approx(eager.losses, rel=loss)
    assert largest_difference(compiled.gradients, eager.gradients) < gradient
    assert eager.graphs[-1] == 0
    assert 0 < compiled.graphs[0] == compiled.graphs[-1], f"graphs compiled after each step: {compiled.graphs}"


@pytest.mark.parametrize("world_size", [1, 2])
def test_compiled_blocks_train_as_eager_ones_and_are_never_compiled_again(world_size: int) -> None:
    pairs = ONE_PROCESS if world_size == 1 else TWO_PROCESSES
    cases = {f"{name}, {kind}": case for name, pair in pairs.items() for kind, case in zip(("eager", "compiled"), pair, strict=True)}
    for outcomes in run_distributed(all_outcomes, world_size, cases, timeout_seconds=290):
        for name, (eager, _) in pairs.items():
            is_low = eager.dtype != "float32"
            bounds = (2e-3, 0.1) if is_low else (1e-5, 1e-4)
            check(outcomes[f"{name}, compiled"], outcomes[f"{name}, eager"], loss=bounds[0], gradient=bounds[1])


def test_rows_are_taken_as_packed_however_they_were_divided() -> None:
    seq = SequenceInfo.whole(2, T)
    halves = SequenceInfo(seq.position_BT, seq.document_BT, seq.index_T, seq.row_B, T, None, packed=False, undivided=seq)
    packed = as_packed(halves)
    assert packed.packed
    assert packed.undivided is not None
    assert packed.undivided.packed
    assert torch.equal(packed.position_BT, seq.position_BT)
    assert not seq.packed
