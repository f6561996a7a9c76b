"""The columns of the parity matrix: how the run of one process, eager and in fp32, is run another way."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

FP32_BOUND = 1e-5
FP64_BOUND = 1e-10
FLOAT8_BOUND = 0.5
"""Of all gradients as one vector; float8 has 3 bits of fraction (e4m3) or 2 (e5m2), so a rounding alone is off by up to 1/8. Seen: 0.15 to
0.30, and 0.43 where no residual carries the stream past a mixer."""
FLOAT8_LOSS_BOUND = 5e-2


class Compared(Enum):
    """What a column does beside setting keys."""

    SAME_ROWS = "the same rows"
    ALONE = "each document in a row of its own, against packed rows"
    RESUMED = "step 1 under the keys, a checkpoint, steps 2 and 3 under other keys"


@dataclass(frozen=True)
class Column:
    """``keys``: of the configuration, dotted, beside those of a row. ``resumed_keys``: those after a checkpoint.

    ``rows``: globs of the rows that it is run for. ``by_norm``: all gradients are compared as one vector, not each tensor.
    ``loss_bound``, ``gradient_bound``: in fp32, where they are wider than FP32_BOUND.
    """

    name: str
    group: str
    n_processes: int
    keys: Mapping[str, Any]
    compared: Compared = Compared.SAME_ROWS
    resumed_keys: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = ("*",)
    by_norm: bool = False
    loss_bound: float = FP32_BOUND
    gradient_bound: float = FP32_BOUND

    def reason(self, row: str) -> str | None:
        """Why it is not run for a row."""
        if any(fnmatchcase(row, pattern) for pattern in self.rows):
            return None
        return "compiling is slow, so this column is run for some rows alone; the column 'compile' traces all of them"

    @property
    def compiles(self) -> bool:
        return bool(self.keys.get("compile.enable"))

    def bounds(self, dtype: str) -> tuple[float, float]:
        """Of loss and gradients; float8 is as coarse in either dtype."""
        is_exact = self.loss_bound == FP32_BOUND
        return (FP64_BOUND, FP64_BOUND) if dtype == "float64" and is_exact else (self.loss_bound, self.gradient_bound)


REFERENCE = Column("1 process", "", 1, {})

TP2, CP2 = {"parallelism.tensor_parallel_degree": 2}, {"parallelism.context_parallel_degree": 2}
METHOD, BALANCE = "parallelism.context_parallel_method", "parallelism.context_parallel_load_balance"
AC = "activation_checkpoint.mode"
COMPILE = {"compile.enable": True, "compile.backend": "aot_eager"}
INDUCTOR = {"compile.enable": True, "compile.backend": "inductor"}
FLOAT8 = "quantize.linear.float8"
COMPILED_ROWS = (
    *("absolute none", "relative linear_cpb", "relative rotary", "relative t5", "GQA*", "sinks", "window of 8"),
    *("value residual, learned", "NoPE*", "norm layernorm", "residual sandwich", "channel mlp", "mixer *", "everything*", "dropout*"),
)
"""One of each kind of graph."""


def columns() -> list[Column]:
    """All columns. ``aot_eager`` traces and divides a graph as ``inductor`` does, and then runs torch's own kernels."""
    budget = {**INDUCTOR, AC: "memory_budget", "activation_checkpoint.memory_budget": 0.5}
    data, tensor, context, technique = "Data parallelism", "Tensor parallelism", "Context parallelism", "Techniques"
    no_sequence_parallelism = {**TP2, "parallelism.enable_sequence_parallel": False}
    return [
        Column("FSDP2", data, 2, {}),
        Column("HSDP 2x2", data, 4, {"parallelism.data_parallel_replicate_degree": 2}),
        Column("FSDP2 x TP2", data, 4, TP2),
        Column("FSDP2 x CP2", data, 4, CP2),
        Column("accumulation", data, 1, {"training.local_batch_size": 1}),
        Column("accumulation, FSDP2", data, 2, {"training.local_batch_size": 1}),
        Column("resumed: FSDP2 x TP2 to TP2 x CP2", data, 4, TP2, Compared.RESUMED, {**TP2, **CP2}),
        Column("TP2", tensor, 2, TP2),
        Column("TP2, no sequence parallelism", tensor, 2, no_sequence_parallelism),
        Column("TP2, no loss parallelism", tensor, 2, {**TP2, "parallelism.enable_loss_parallel": False}),
        Column("TP2 x CP2", tensor, 4, {**TP2, **CP2}),
        Column("compile, TP2", tensor, 2, {**TP2, **COMPILE}),
        Column("CP2 gather", context, 2, {**CP2, METHOD: "gather"}),
        Column("CP2 gather, contiguous", context, 2, {**CP2, METHOD: "gather", BALANCE: "contiguous"}),
        Column("CP2 heads", context, 2, {**CP2, METHOD: "heads"}),
        Column("CP2 ring", context, 2, {**CP2, METHOD: "ring"}),
        Column("CP2 ring, contiguous", context, 2, {**CP2, METHOD: "ring", BALANCE: "contiguous"}),
        Column("CP2 state", context, 2, {**CP2, METHOD: "state"}),
        Column("AC full", technique, 1, {AC: "full"}),
        Column("AC full, TP2 x CP2", technique, 4, {**TP2, **CP2, AC: "full"}),
        Column("AC selective", technique, 1, {AC: "selective"}),
        Column("AC memory budget", technique, 1, budget, rows=COMPILED_ROWS),
        Column("compile", technique, 1, COMPILE),
        Column("compile, inductor", technique, 1, INDUCTOR, rows=COMPILED_ROWS),
        Column("compile, AC selective, CP2", technique, 2, {**COMPILE, **CP2, AC: "selective"}, rows=COMPILED_ROWS),
        Column(
            "float8 emulated",
            technique,
            1,
            {f"{FLOAT8}.enable": True, f"{FLOAT8}.emulate": True},
            by_norm=True,
            loss_bound=FLOAT8_LOSS_BOUND,
            gradient_bound=FLOAT8_BOUND,
        ),
        Column("packing", technique, 1, {}, Compared.ALONE),
    ]
