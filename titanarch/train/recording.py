"""What a replayed step computed, tensor by tensor, so that it can be compared with the same step on other processes.

A process keeps its part of every tensor, with the rows and tokens that the part belongs to. ``Recording`` puts the parts of all
processes together: the rows of data parallelism, the tokens of context and sequence parallelism, the heads and hidden units of tensor
parallelism, and the sums of which each process has a term. So that large models fit, of tensors of many tokens every n-th token is kept
beside the norm.

Shapes: B rows of a micro-batch, T tokens of a row here, N tokens kept.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from titanarch.contract.sequence import SequenceInfo
from titanarch.data.batch import Batch
from titanarch.parallel.context_layout import ContextLayout
from titanarch.parallel.mesh import Mesh
from titanarch.parallel.sequence_division import SequenceDivision
from titanarch.train.names import plain_name

KEPT_VALUES = 2**20
"""Values kept of a tensor of the step as wide as the widest parameter, about."""
LEAST_TOKENS = 64
SAMPLED = 4096
"""Values kept of what has no tokens, such as a parameter, evenly spread, beside its norm."""

Part = dict[str, Tensor]
"""Of a tensor in one micro-batch on one process: ``ids`` of the tokens kept in the step, ``values``, and the sum of ``squares`` of all.
Of what has no tokens the ``sample`` alone; what is flat may have none and has both."""

Join = Literal["alike", "tokens", "channels", "pieces"]
"""What the processes of tensor parallelism have: the same, other tokens, other heads or units of each token; or nothing of tokens."""


def sample(tensor: Tensor) -> Tensor:
    """The norm and up to SAMPLED values, fp64 on the host."""
    flat = tensor.detach().reshape(-1)
    values = flat[:: max(1, -(-flat.numel() // SAMPLED))].double().cpu()
    return torch.cat([torch.linalg.vector_norm(flat, dtype=torch.float64).cpu()[None], values])


def token_places(mesh: Mesh, length: int, *, head_tail: bool, sequence_parallel: bool) -> dict[int, Tensor]:
    """Where in a row of ``length`` the tokens of a tensor here are, by how many it has: of the residual stream, and inside mixers.

    ``head_tail``: how context parallelism cuts rows. Places from ``length`` on are padding.
    """
    layout = ContextLayout(mesh.context_group, head_tail=head_tail) if mesh.degrees.cp > 1 else None
    division = SequenceDivision(mesh, layout, sequence_parallel=sequence_parallel)
    _, seq = division.divide(torch.zeros(1, length, dtype=torch.int64), SequenceInfo.whole(1, length))
    places = {len(seq.index_T): seq.index_T}
    while seq.undivided is not None:
        seq = seq.undivided
        places[len(seq.index_T)] = seq.index_T
    return places


class Recorder:
    """This process's part of a step; ``table`` has it as plain dicts, lists and tensors. All methods but the hooks are collective."""

    def __init__(self) -> None:
        self.table: dict[str, Any] = {"outputs": {}, "output_gradients": {}, "parameters": {}, "parameter_gradients": {}}
        self._places: dict[int, Tensor] = {}
        self._rows_B: list[Tensor] = []
        self._length, self._every = 0, 1
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def begin(self, model: nn.Module, mesh: Mesh, batches: Sequence[Batch], *, first_row: int, places: dict[int, Tensor]) -> None:
        """The step of ``batches`` comes, which begins at ``first_row`` of the run. Takes the parameters as they are before it.

        ``places``: see ``token_places``.
        """
        degrees = mesh.degrees
        self._places, self._length = places, batches[0].tokens_BT.shape[1]
        self._rows_B = [batch.row_B - first_row for batch in batches]
        n_tokens = degrees.data_parallel * sum(batch.tokens_BT.numel() for batch in batches)
        widest = max((p.shape[-1] for p in model.parameters() if p.dim()), default=1)
        self._every = -(-n_tokens // max(KEPT_VALUES // widest, LEAST_TOKENS)) | 1  # odd, so that it is not the same places of all rows
        self.table["degrees"] = [degrees.data_parallel, degrees.cp, degrees.tp, len(batches)]
        self.table["tensor_rank"] = mesh.rows.get_local_rank("tp")
        self.table["tokens"] = {int(row): tokens for batch in batches for row, tokens in zip(batch.row_B, batch.tokens_BT, strict=True)}
        for name, parameter in model.named_parameters():
            self.table["parameters"][plain_name(name)] = sample(_full(parameter.detach()))

    def output(self, micro_batch: int, module: str, tensors: Sequence[Tensor]) -> None:
        """A hook: what a module gave, which may be called more than once."""
        parts = self.table["outputs"].setdefault(module, [[] for _ in self._rows_B])
        parts[micro_batch] += [self._part(micro_batch, tensor) for tensor in tensors]

    def gradient(self, micro_batch: int, module: str, index: int, tensor: Tensor) -> None:
        """A hook: the gradient of a module's output number ``index``, over its calls."""
        parts = self.table["output_gradients"].setdefault(module, [{} for _ in self._rows_B])
        parts[micro_batch][index] = self._part(micro_batch, tensor)

    def parameter_gradients(self, model: nn.Module) -> None:
        """Those of the whole step."""
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.table["parameter_gradients"][plain_name(name)] = sample(_full(parameter.grad))

    def _part(self, micro_batch: int, tensor: Tensor) -> Part:
        row_B = self._rows_B[micro_batch]
        n_rows, shape = len(row_B), tensor.shape
        if tensor.dim() >= 3 and shape[0] == n_rows and shape[1] in self._places:
            return self._tokens(micro_batch, tensor)
        part = {"sample": sample(tensor)}
        if tensor.dim() >= 2 and shape[0] % n_rows == 0 and shape[0] // n_rows in self._places:
            part |= self._tokens(micro_batch, tensor.unflatten(0, (n_rows, -1)))
        return part

    def _tokens(self, micro_batch: int, x: Tensor) -> Part:
        """``x``: [B, T, ...]."""
        row_B, T = self._rows_B[micro_batch], x.shape[1]
        if (micro_batch, T) not in self._kept:
            index_T = self._places[T].cpu()
            ids_BT = row_B[:, None] * self._length + index_T
            real_T = index_T < self._length
            self._kept[micro_batch, T] = ids_BT, real_T, real_T & (ids_BT % self._every == 0)
        ids_BT, real_T, kept_BT = self._kept[micro_batch, T]
        squares = torch.linalg.vector_norm(x[:, real_T.to(x.device)], dtype=torch.float64).square().cpu()
        return {"ids": ids_BT[kept_BT], "values": x[kept_BT.to(x.device)].cpu(), "squares": squares}


def _full(tensor: Tensor) -> Tensor:
    """All of a parameter or its gradient. Collective where it is divided."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements = list(tensor.placements)
    for axis in range(len(placements)):  # FSDP cuts what tensor parallelism has cut, so it comes first; torch warns of both at once
        placements[axis] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


class Whole(NamedTuple):
    """A tensor of the step. ``values``: of the tokens kept, in order, [N, ...], with the ``norm`` of all, NaN where it is not known.

    ``pieces``: of what has no tokens, or may have none, the sample of each process and micro-batch.
    """

    values: Tensor | None
    norm: float
    pieces: tuple[Tensor, ...]

    @property
    def only_piece(self) -> Tensor | None:
        """That of what is alike on all processes and in all micro-batches; None where there is no such."""
        return self.pieces[0] if self.pieces and all(_alike(self.pieces[0], piece) for piece in self.pieces[1:]) else None


@dataclass(frozen=True)
class Recording:
    """A step, of all processes. ``losses``: of this and earlier steps that were made for it; ``degrees``: how it was divided.

    ``tokens``: of its rows, in order. The others have the outputs of a module over all its calls, or one sample, by name; outputs
    come in forward order and their gradients in backward order, as process 0 had them.
    """

    losses: dict[int, float]
    degrees: tuple[int, ...]
    tokens: list[list[int]]
    parameters: dict[str, Tensor]
    parameter_gradients: dict[str, Tensor]
    outputs: dict[str, list[Whole]] = field(repr=False)
    output_gradients: dict[str, list[Whole]] = field(repr=False)

    @classmethod
    def of(cls, tables: Sequence[Mapping[str, Any]], losses: dict[int, float]) -> "Recording":
        """From the tables of all processes, by rank."""
        first, ranks = tables[0], [table["tensor_rank"] for table in tables]
        joins = {name: [_join_of(ranks, parts) for parts in _parts(tables, "outputs", name)] for name in first["outputs"]}
        outputs, gradients = (
            {
                name: [_joined(ranks, parts, join) for parts, join in zip(_parts(tables, kind, name), joins[name], strict=False) if parts]
                for name in first[kind]
            }
            for kind in ("outputs", "output_gradients")
        )
        tokens = {row: ids.tolist() for table in tables for row, ids in table["tokens"].items()}
        return cls(
            losses=losses,
            degrees=tuple(first["degrees"]),
            tokens=[tokens[row] for row in sorted(tokens)],
            parameters=dict(first["parameters"]),
            parameter_gradients=dict(first["parameter_gradients"]),
            outputs=outputs,
            output_gradients=gradients,
        )

    @classmethod
    def read(cls, folder: Path) -> "Recording":
        """What the processes of a replay have written to ``folder`` by ``write``."""
        paths = sorted(folder.glob("process-*.pt"), key=lambda path: int(path.stem.rpartition("-")[2]))
        tables = [torch.load(path, weights_only=True) for path in paths]
        return cls.of(tables, tables[0]["losses"])


def write(folder: Path, rank: int, recorder: Recorder, losses: dict[int, float]) -> None:
    """This process's part, for ``Recording.read``."""
    torch.save({**recorder.table, "losses": losses}, folder / f"process-{rank}.pt")


def _parts(tables: Sequence[Mapping[str, Any]], kind: str, name: str) -> list[list[list[Part]]]:
    """Of each output of a module, by process, the parts of the micro-batches; empty where a process lacks one."""
    of_each = [table[kind].get(name, []) for table in tables]
    indices = sorted({i for found in of_each for batch in found for i in (batch if isinstance(batch, dict) else range(len(batch)))})
    parts = []
    for index in range(max(indices, default=-1) + 1):
        try:
            parts.append([[batch[index] for batch in found] for found in of_each])
        except (KeyError, IndexError):  # a gradient that did not reach it, or a module that was called less often
            parts.append([])
    return parts


def _join_of(ranks: Sequence[int], parts: Sequence[Sequence[Part]]) -> Join:
    """How the processes' parts of an output make the whole. ``ranks``: theirs in tensor parallelism."""
    flat = [part for own in parts for part in own]
    samples = [part["sample"] for part in flat if "sample" in part]
    if any("ids" not in part for part in flat):
        return "pieces"
    if len(flat) == len(samples) > 1 and all(_alike(samples[0], each) for each in samples[1:]):
        return "pieces"  # a table that looks like tokens, since micro-batches are not alike
    first, *others = _sides(ranks, parts)
    if any(not torch.equal(side["ids"], first["ids"]) for side in others):
        return "tokens"
    return "alike" if all(_alike(side["values"], first["values"]) for side in others) else "channels"


def _joined(ranks: Sequence[int], parts: Sequence[Sequence[Part]], join: Join) -> Whole:
    """The whole of an output or of its gradient. A gradient of what is alike may be one of the terms of a sum."""
    pieces = tuple(part["sample"] for own in parts for part in own if "sample" in part)
    if join == "pieces":
        return Whole(None, math.nan, pieces)
    sides = _sides(ranks, parts)
    if join == "tokens":
        sides = [_ordered(sides)]
    if join == "channels":
        squares = torch.stack([side["squares"] for side in sides]).sum()
        return Whole(torch.cat([side["values"] for side in sides], 1), float(squares.sqrt()), pieces)
    if all(_alike(side["values"], sides[0]["values"]) for side in sides):
        return Whole(sides[0]["values"], float(sides[0]["squares"].sqrt()), pieces)
    return Whole(torch.stack([side["values"] for side in sides]).sum(0), math.nan, pieces)


def _sides(ranks: Sequence[int], parts: Sequence[Sequence[Part]]) -> list[Part]:
    """Each rank's tokens in tensor parallelism, in the order of the step."""
    return [_ordered([part for at, own in zip(ranks, parts, strict=True) if at == rank for part in own]) for rank in sorted(set(ranks))]


def _ordered(parts: Sequence[Part]) -> Part:
    """Parts of other tokens as one, in the order of the step."""
    ids = torch.cat([part["ids"] for part in parts])
    values = torch.cat([part["values"] for part in parts])
    order = ids.argsort()
    return {"ids": ids[order], "values": values[order], "squares": torch.stack([part["squares"] for part in parts]).sum()}


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
