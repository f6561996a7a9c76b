"""A plan as text."""

from collections.abc import Iterator

from titanarch.plan.fit import GIB, memory_lines
from titanarch.plan.plan import Plan, capacity_bytes
from titanarch.train.metrics.results import counted

TRACED_AS = {
    "cuda": "traced on fake tensors that lie on the CPU, with the attention and loss routes of a GPU: attention keeps q, k, v, y and the\n"
    "log-sum-exp as FlexAttention and cuDNN do. Not traced: compilation, which keeps fewer intermediate results, and what libraries\n"
    "and the allocator hold beside.",
    "cpu": "traced on fake tensors of the CPU. Not traced: compilation, scratch memory of kernels, and the interpreter itself.",
}


def plan_text(plan: Plan, *, name: str, device: str) -> str:
    """The whole report; ``name`` of the configuration, ``device`` as on the command line. It does not depend on the machine."""
    return "\n".join(line.rstrip() for line in _lines(plan, name, device)) + "\n"


def _lines(plan: Plan, name: str, device: str) -> Iterator[str]:
    d, training = plan.degrees, plan.config.training
    yield f"plan of {name} on {plan.world_size} x {device}: predicted, nothing was run"
    yield "verdict: it can be launched"
    yield f"mesh: dp_replicate {d.dp_replicate}, dp_shard {d.dp_shard}, cp {d.cp}, tp {d.tp}"
    yield from (f"note: {note}" for note in plan.trace.notes)
    yield f"parameters: {plan.cost.parameters:,}; compute in {training.mixed_precision_param}"
    yield f"step: {training.global_batch_size:,} rows of {training.seq_len:,} tokens; {plan.trace.rows} a process at a time in"
    yield f"      {plan.trace.n_micro_batches} micro-batches; activation checkpointing: {plan.config.activation_checkpoint.mode}"
    if training.phases:
        yield "      the phases before it (training.phases) are not in what follows"
    yield ""
    yield "memory of a process at its peak (predicted)"
    yield from memory_lines(plan.trace.peak)
    if plan.device.memory_bytes is not None:
        capacity = capacity_bytes(plan.device, plan.world_size)
        verdict = "fits into" if plan.fits else "does NOT fit into"
        share = f"{100 * plan.device.usable_memory:.0f} % of {plan.device.memory_bytes / 1e9:.0f} GB"
        yield f"  {verdict} {capacity / GIB:.1f} GiB ({share})"
    if plan.config.parallelism.enable_cpu_offload:
        yield "  of it in host memory, by enable_cpu_offload: parameters, gradients, optimizer states"
    yield ""
    yield from _traffic_lines(plan)
    yield ""
    yield from _time_lines(plan)
    yield ""
    yield TRACED_AS[plan.device.device_type]
    if plan.trace.n_micro_batches > 2:
        n = plan.trace.n_micro_batches
        yield f"Two of the {n} micro-batches were traced: all but the last send what the first sends, so bytes are exact."


def _traffic_lines(plan: Plan) -> Iterator[str]:
    yield "sent by a process in a step (predicted; a byte is counted once on each link of a ring)"
    yield f"  {'axis':<14}{'collective':<16}{'calls':>8}{'GB':>12}"
    for item in plan.trace.traffic:
        yield f"  {item.axis:<14}{item.kind:<16}{item.calls:>8,}{item.sent_bytes / 1e9:>12.4f}"
    for axis, formula in plan.trace.formulas.items():
        traced = plan.trace.sent_bytes(axis)
        if formula is None:
            yield f"  {axis}: {traced / 1e9:.4f} GB; no closed formula for these mixers or this checkpointing"
        else:
            yield f"  {axis}: {traced / 1e9:.4f} GB, closed formula {formula / 1e9:.4f} GB ({100 * (traced / formula - 1):+.2f} %)"


def _time_lines(plan: Plan) -> Iterator[str]:
    time, device, flops = plan.time, plan.device, plan.cost.training_flops_per_token * plan.tokens
    yield f"FLOPs of a step: {counted(flops)}FLOP ({counted(plan.cost.training_flops_per_token)}FLOP a token, three forwards)"
    yield f"step time (predicted from a table of devices): {time.total:.3f} s"
    yield f"  compute {time.compute:.3f} s at {100 * device.efficiency:.0f} % of the peak; communication waited for {time.exposed:.3f} s,"
    yield f"  beside the computation {time.hidden:.3f} s; update {time.update:.3f} s"
    yield f"  {plan.tokens / time.total:,.0f} tokens/s, {plan.tokens / time.total / plan.world_size:,.0f} a process"
