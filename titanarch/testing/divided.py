"""Checks on several processes: each way in which a component says that it can be divided gives what one process gives.

Shapes: B rows, T tokens, D model dim.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from titanarch.contract.channel import ChannelMixer
from titanarch.contract.mixer import LocalMixer, SequenceMixer
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.split import ContextParallel
from titanarch.parallel.check import why_not_divided
from titanarch.parallel.collectives import gather_sequence
from titanarch.parallel.context_layout import ContextLayout
from titanarch.parallel.context_parallel import MIX_BY_METHOD, apply_context_parallel
from titanarch.parallel.fsdp import fp32_modules
from titanarch.parallel.tensor_parallel import apply_tensor_parallel
from titanarch.testing.behaviour import BF16_ERROR
from titanarch.testing.findings import ROUNDINGS, Finding, Inapplicable, Wrong, require_equal, rounding, tolerance
from titanarch.testing.kit import failure, raised
from titanarch.testing.processes import run_distributed
from titanarch.testing.subject import N_ROWS, Subject, built, inputs, outcome, rows

Outcome = dict[str, Tensor]

REMEDIES = {
    "tensor": "look at tensor_parallel: COLUMN and PER_HEAD are divided by head, ROW sums parts, SHARED is used on local heads and its "
    "gradient summed, REPLICATED is used alike on all",
    "context": "look at what mix reads along the sequence: where tokens are comes from seq, earlier ones from seq.previous or the keys",
    "FSDP2": "parameters are gathered by a module's forward: read them inside it, and those of other dtypes from a HeadParams",
}


@dataclass(frozen=True)
class Way:
    """One way of dividing; ``run`` gives the outcome made whole, on every process."""

    name: str
    remedy: str
    run: Callable[[Subject, DeviceMesh], Outcome]
    reason: str = ""
    """Why it does not apply; empty where it does."""


def check_divided(subjects: Sequence[Subject], n_processes: int, *, timeout_seconds: float = 240.0) -> list[Finding]:
    """Every way of dividing every subject among ``n_processes``, in one start of processes. RankError where one dies or hangs."""
    for subject in subjects:
        built(subject)  # what is refused is told here, not by a process
    by_rank = run_distributed(_on_every_process, n_processes, list(subjects), timeout_seconds=timeout_seconds)
    return [next((found for found in same if not found.passed), same[0]) for same in zip(*by_rank, strict=True)]


def _on_every_process(subjects: list[Subject]) -> list[Finding]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    findings: list[Finding] = []
    for subject in subjects:
        for module in subject.imports:
            importlib.import_module(module)
        try:
            (x, weights), stack = inputs(), built(subject)
            expected, bound = outcome(stack, x, rows(stack), weights), max(tolerance(subject), ROUNDINGS * rounding(subject))
        except Exception as error:  # noqa: BLE001 (a component may raise anything; the other subjects go on)
            findings.append(failure(subject, "one process", f"{subject.name}: {raised(error)}"))
            continue
        findings += [_found(subject, way, mesh, expected, bound) for way in ways(subject, mesh.size())]
    return findings


def _found(subject: Subject, way: Way, mesh: DeviceMesh, expected: Outcome, bound: float) -> Finding:
    if way.reason:
        return Finding(subject.name, way.name, "-", way.reason)
    try:
        found = way.run(subject, mesh)
        if way.name == "FSDP2 in bf16":
            return Finding(subject.name, way.name, "ok", _near(subject, found, expected))
        what = f"outputs and gradients of {mesh.size()} processes and of one"
        return Finding(subject.name, way.name, "ok", require_equal(subject, found, expected, what=what, remedy=way.remedy, bound=bound))
    except Wrong as wrong:
        return failure(subject, way.name, str(wrong))
    except Inapplicable as reason:
        return Finding(subject.name, way.name, "-", str(reason))
    except Exception as error:  # noqa: BLE001 (a component may raise anything, and alike on all processes)
        return failure(subject, way.name, f"{subject.name}: {raised(error)}; {way.remedy}")


def ways(subject: Subject, degree: int) -> Iterator[Way]:
    """The ways that the component declares, and those that it does not with the reason."""
    component = next(built(subject).components())
    reason = "it is a LocalMixer, which declares nothing" if isinstance(component, LocalMixer) else why_not_divided(component, degree)
    yield Way("tensor parallel", REMEDIES["tensor"], lambda *given: _tensor(*given, sequence_parallel=False), reason)
    yield Way("tensor and sequence parallel", REMEDIES["tensor"], lambda *given: _tensor(*given, sequence_parallel=True), reason)
    if isinstance(component, SequenceMixer):
        for method in component.context_parallel:
            mix = MIX_BY_METHOD[method]
            for head_tail in (False, True) if mix.head_tail else (False,):
                name = f"context parallel by {method.value}{', head-tail' if head_tail else ''}"
                yield Way(name, REMEDIES["context"], _by(method, head_tail=head_tail), mix.why_not(component, degree, 1))
    elif not isinstance(component, LocalMixer):
        for head_tail in (False, True):
            yield Way(f"context parallel{', head-tail' if head_tail else ''}", REMEDIES["context"], _by(None, head_tail=head_tail))
    yield Way("FSDP2", REMEDIES["FSDP2"], lambda *given: _sharded(*given, dtype=torch.float64))
    yield Way("FSDP2 in bf16", REMEDIES["FSDP2"], lambda *given: _sharded(*given, dtype=torch.bfloat16))


def _tensor(subject: Subject, mesh: DeviceMesh, *, sequence_parallel: bool) -> Outcome:
    stack, (x, weights) = built(subject), inputs()
    seq, group = rows(stack), mesh.get_group()
    for component in stack.components():
        assert isinstance(component, SequenceMixer | ChannelMixer), "a LocalMixer declares nothing"
        apply_tensor_parallel(component, mesh, sequence_parallel=sequence_parallel)
    if not sequence_parallel:
        return _whole(outcome(stack, x, seq, weights))
    own = lambda x, dim: x.chunk(mesh.size(), dim)[group.rank()]  # noqa: E731 (given twice, as it is)
    divided = replace(seq.some(own), undivided=seq)
    found = _whole(outcome(stack, own(x, 1), divided, own(weights, 1)))
    return {name: gather_sequence(v, group) if name in ("output", "gradient of the input") else v for name, v in found.items()}


def _by(method: ContextParallel | None, *, head_tail: bool) -> Callable[[Subject, DeviceMesh], Outcome]:
    """Context parallelism by ``method``; None for what mixes no tokens."""

    def run(subject: Subject, mesh: DeviceMesh) -> Outcome:
        stack, (x, weights) = built(subject), inputs()
        layout = ContextLayout(mesh.get_group(), head_tail=head_tail)
        for component in stack.components():
            if isinstance(component, SequenceMixer):
                assert method is not None, "mixers declare how"
                apply_context_parallel(component, layout, method)
        found = outcome(stack, layout.own(x, 1), layout.divide(rows(stack)), layout.own(weights, 1))
        for name, value in found.items():
            if name in ("output", "gradient of the input"):
                found[name] = layout.in_order(gather_sequence(value, mesh.get_group()))
            else:
                dist.all_reduce(value)
        return found

    return run


def _sharded(subject: Subject, mesh: DeviceMesh, *, dtype: torch.dtype) -> Outcome:
    """Each process has rows of its own. In bf16 parameters are fp32, and children that are declared so compute in it."""
    low = dtype != torch.float64
    stack, (x, weights) = built(subject, torch.float32 if low else dtype), inputs()
    if N_ROWS % mesh.size():
        raise Inapplicable(f"{N_ROWS} rows do not divide among {mesh.size()} processes")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if low else dtype, cast_forward_inputs=False)
    for layer in stack.layers:
        if low:
            for module in fp32_modules(layer):
                fully_shard(module, mesh=mesh, mp_policy=replace(policy, param_dtype=torch.float32), reshard_after_forward=False)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(stack, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in stack.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    rank, n = mesh.get_group().rank(), N_ROWS // mesh.size()
    own = [t[rank * n : (rank + 1) * n].to(dtype) for t in (x, weights)]
    found = _whole(outcome(stack, own[0], _some_rows(rows(stack), rank * n, n), own[1]))
    if low and any(value.dtype != torch.float32 for name, value in found.items() if name not in ("output", "gradient of the input")):
        raise Wrong(f"{subject.name}: a gradient is not fp32, as parameters under FSDP2 are")
    gathered = {}
    for name, value in found.items():
        parts = [torch.empty_like(value) for _ in range(mesh.size())] if name in ("output", "gradient of the input") else []
        if parts:
            dist.all_gather(parts, value.contiguous())
        gathered[name] = torch.cat(parts) if parts else value
    return gathered


def _some_rows(seq: SequenceInfo, first: int, n: int) -> SequenceInfo:
    at = slice(first, first + n)
    return replace(seq, position_BT=seq.position_BT[at], document_BT=seq.document_BT[at], row_B=seq.row_B[at])


def _whole(found: Outcome) -> Outcome:
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}


def _near(subject: Subject, found: Outcome, expected: Outcome) -> str:
    x, _ = inputs()
    if not all(bool(value.isfinite().all()) for value in found.values()):
        raise Wrong(f"{subject.name}: outputs or gradients in bf16 under FSDP2 are not finite; compute exponentials and states in fp32")
    added = expected["output"] - x
    error = float((found["output"].double() - expected["output"]).norm() / added.norm().clamp(min=1e-300))
    if error > BF16_ERROR:
        raise Wrong(f"{subject.name}: outputs in bf16 under FSDP2 are off by {error:.2f} of their norm ({BF16_ERROR} is allowed)")
    return f"outputs are off by {error:.1e} of their norm ({BF16_ERROR} is allowed)"
