"""A few training steps of a small decoder under any layout and technique, on the processes of a distributed test.

Rows are packed in every second step; each step also evaluates rows of another length. Not a test by itself.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from tests.parallel.divided import divided_decoder
from titanarch.contract.model import Model
from titanarch.contract.sequence import SequenceInfo
from titanarch.parallel.mesh import Mesh

V, T, ROWS = 64, 32, 4
PLAIN: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 64,
    "n_heads": 2,
    "channel": {"kind": "mlp", "activation": "gelu", "d_ff": 128},
    "position": {"relative": "rotary"},
}
EVERYTHING: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 4,
    "dropout": 0.1,
    "channel": {"kind": "swiglu", "d_ff": 64, "dropout": 0.1, "bias": True},
    "position": {"absolute": "scaled_sinusoidal", "relative": ["linear_cpb", "rotary"]},
    "mixers": {
        "attention": {"n_kv_heads": 2, "sinks": True, "qk_norm": True, "dropout": 0.1, "out_bias": True, "value_residual": "learned"}
    },
}


@dataclass(frozen=True)
class Case:
    """What a run of steps is; tables as in a configuration."""

    model: dict[str, Any] = field(default_factory=lambda: PLAIN)
    parallelism: dict[str, Any] = field(default_factory=dict)
    activation_checkpoint: dict[str, Any] = field(default_factory=dict)
    compile: dict[str, Any] = field(default_factory=dict)
    float8: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    n_steps: int = 4


@dataclass
class Outcome:
    """``losses``: of all rows, a step each. ``gradients``: of the first step, whole. ``graphs``: compiled so far, after each step."""

    losses: list[float]
    gradients: dict[str, Tensor]
    graphs: list[int]


def build(case: Case) -> tuple[Model, Mesh]:
    return divided_decoder(
        case.model,
        vocab_size=V,
        seq_len=T,
        parallelism=case.parallelism,
        activation_checkpoint=case.activation_checkpoint,
        compile_table=case.compile,
        float8=case.float8,
        param_dtype=getattr(torch, case.dtype),
    )


def rows(step: int) -> tuple[Tensor, SequenceInfo, Tensor]:
    """The rows of a step, of one document each in even steps, of two in odd ones."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(V, (ROWS, T + 1), generator=generator)
    is_packed = step % 2 == 1
    starts = torch.randint(2, T - 2, (ROWS,), generator=generator).tolist() if is_packed else []
    lengths = [(start, T - start) for start in starts] or [(T,)] * ROWS
    seq = SequenceInfo.of_lengths(lengths, seed=0, first_row=ROWS * step)  # with strides alike, or a graph is compiled again
    return tokens[:, :-1], replace(seq, packed=is_packed), tokens[:, 1:]


def take_steps(case: Case) -> Outcome:
    """Train ``case`` on this process's rows."""
    torch._dynamo.reset()
    counters.clear()
    model, mesh = build(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    n = mesh.degrees.data_parallel
    here = slice(mesh.data_rank * ROWS // n, (mesh.data_rank + 1) * ROWS // n)
    outcome = Outcome([], {}, [])
    for step in range(case.n_steps):
        tokens, seq, labels = rows(step)
        own = replace(seq, position_BT=seq.position_BT[here], document_BT=seq.document_BT[here], row_B=seq.row_B[here])
        objective = model(tokens[here], own, labels[here])
        (objective.total / (ROWS * T)).backward()
        loss = objective.loss_sum.detach().clone()
        dist.all_reduce(loss)
        outcome.losses.append(loss.item() / (ROWS * T))
        if step == 0:
            outcome.gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        model.after_update()
        optimizer.zero_grad()
        length = 8 * (1 + step % 3)
        with torch.no_grad():
            model.token_losses(tokens[here][:, :length], SequenceInfo.whole(ROWS // n, length), labels[here][:, :length])
        outcome.graphs.append(counters["stats"]["unique_graphs"])
    return outcome


def all_outcomes(cases: dict[str, Case]) -> dict[str, Outcome]:
    """Every case one after the other, in the same processes."""
    return {name: take_steps(case) for name, case in cases.items()}


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()
