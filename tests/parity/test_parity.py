"""A part of the parity matrix: one row for each method of context parallelism, one for tensor parallelism, and one of a mixer
that is registered from outside. ``scripts/parity.py`` measures the whole."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.parity.columns import Column, columns
from tests.parity.matrix import Cell, Matrix, read_cells, to_json
from tests.parity.measure import Difference, difference, zero_gradients
from tests.parity.rows import Row, mixer_row, rows
from tests.parity.trial import Outcome, rows_of

TOY = mixer_row("toy_ssm", imports=("tests.parity.toy_mixer",))
OTHER = Column("another run", "", 1, {"training.z_loss_weight": 2e-3})
"""Not a technique: it must not pass for one."""
CELLS: dict[str, list[str]] = {
    "everything at once": ["TP2", "CP2 gather"],
    "GQA, 2 key/value heads": ["CP2 heads", "CP2 ring", "CP2 state", OTHER.name],
    "H-Net": ["FSDP2", "TP2, no sequence parallelism", "CP2 gather"],
    TOY.name: ["FSDP2", "accumulation", "TP2", "CP2 heads", "CP2 state", "CP2 gather", "AC full", "packing"],
}
REFUSED = {
    ("GQA, 2 key/value heads", "CP2 state"): "declares gather, heads, ring",
    ("H-Net", "CP2 gather"): "HNet cannot be divided: where its chunks begin depends on the data",
    (TOY.name, "CP2 gather"): "declares state, heads",
}
EXPECTED = [(row, column) for row, names in CELLS.items() for column in names]


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    chosen = [row for row in (*rows(), TOY) if row.name in CELLS]
    found = Matrix(chosen, [*columns(), OTHER], wanted=lambda row, column: column.name in CELLS[row.name])
    said: list[tuple[str, str]] = []
    found.measure(n_processes=2, say=lambda row, column: said.append((row, column.name)))
    assert sorted(said) == sorted(EXPECTED)
    return found


@pytest.mark.parametrize(("row", "column"), EXPECTED)
def test_a_technique_is_the_run_of_one_process(matrix: Matrix, row: str, column: str) -> None:
    cell, known = matrix.cells[row, column], {c.name: c for c in matrix.columns}[column]
    if (row, column) in REFUSED:
        assert REFUSED[row, column] in cell.reason
        return
    assert cell.difference is not None, cell.reason + cell.failure
    if column == OTHER.name:
        assert cell.exceeds(known, "float32")
        assert 1e-4 < cell.difference.loss < 1e-1
        assert 1e-4 < cell.difference.gradient < 1e-1
        return
    assert not cell.exceeds(known, "float32"), matrix.line(row, known)


def test_the_table_and_the_failures_tell_what_was_found(matrix: Matrix) -> None:
    assert [line.split("  ", 1)[1] for line in matrix.failures() if OTHER.name not in line] == []
    assert len(matrix.failures()) == 1
    table = matrix.markdown()
    assert "| GQA, 2 key/value heads | **" in table
    assert f"| {TOY.name} |" in table
    assert "CP2 gather, contiguous" in table.split("Empty cells")[0]
    assert "state: it declares gather, heads, ring" in table.split("Empty cells")[1]


def test_measured_cells_are_read_back_and_not_run_again(matrix: Matrix) -> None:
    text = "\n".join(to_json(*key, cell) for key, cell in matrix.cells.items())
    again = Matrix(matrix.rows, matrix.columns, wanted=matrix.wanted, cells=read_cells(text))
    assert again.cells == matrix.cells
    again.measure(say=lambda row, column: pytest.fail(f"{row}, {column.name} was run again"))
    assert again.markdown() == matrix.markdown()
    assert read_cells(to_json("a", "b", Cell(failure="it broke"))) == {}


def outcome(losses: list[float], **gradients: list[float]) -> Outcome:
    return Outcome(tuple(losses), {name: np.array(g, dtype=np.float32) for name, g in gradients.items()})


def test_differences_are_relative_to_the_largest_element_or_to_a_share_of_all() -> None:
    expected = outcome([2.0, 4.0], a=[3.0, -4.0], b=[0.0, 0.0])
    rms = math.sqrt((9 + 16) / 4)
    found = outcome([2.0, 4.1], a=[3.0, -4.4], b=[0.0, 1e-4])
    d = difference(found, expected)
    assert d.loss == pytest.approx(0.1 / 4)
    assert (d.where, d.gradient) == ("a", pytest.approx(0.4 / 4))
    d = difference(outcome([2.0, 4.0], a=[3.0, -4.0], b=[0.0, 1e-4]), expected)
    assert (d.where, d.gradient) == ("b", pytest.approx(1e-4 / (1e-3 * rms)))
    assert d.gradient_norm == pytest.approx(1e-4 / 5)
    d = difference(outcome([2.0, 4.0], a=[3.0, -4.0], b=[0.0, 1e-4]), expected, zero={"b"})
    assert (d.where, d.gradient) == ("b", pytest.approx(1e-4 / rms))


@pytest.mark.parametrize(
    "found",
    [
        outcome([1.0], a=[math.nan]),
        outcome([math.nan], a=[1.0]),
        outcome([1.0], b=[1.0]),
        outcome([1.0], a=[1.0], b=[0.0]),
        outcome([], a=[1.0]),
    ],
)
def test_what_is_missing_or_not_a_number_is_infinitely_far(found: Outcome) -> None:
    d = difference(found, outcome([1.0], a=[1.0]))
    assert max(d.loss, d.gradient) == math.inf


def test_zero_gradients_are_those_that_float64_shows_as_zero() -> None:
    found = Outcome((1.0,), {"a": np.array([1.0, 2.0]), "b": np.array([1e-14]), "c": np.array([1e-6]), "d": np.zeros(3)})
    assert zero_gradients(found) == {"b", "d"}


@pytest.mark.parametrize(
    ("cell", "exceeds"),
    [
        (Cell(Difference(1e-6, 1e-6, 1e-3, "a")), False),
        (Cell(Difference(2e-5, 1e-6, 1e-6, "a")), True),
        (Cell(Difference(1e-6, 2e-5, 1e-6, "a")), True),
        (Cell(Difference(math.inf, 0.0, 0.0, "a")), True),
        (Cell(reason="it cannot be divided"), False),
        (Cell(failure="it broke"), True),
    ],
)
def test_a_cell_exceeds_in_loss_or_gradient_or_by_breaking(cell: Cell, exceeds: bool) -> None:
    column = Column("a technique", "", 1, {})
    assert cell.exceeds(column, "float32") is exceeds
    assert cell.exceeds(column, "float64") is (exceeds or cell.difference is not None)
    assert Cell(Difference(0.0, 1.0, 1e-6, "a")).exceeds(column, "float32")
    assert not Cell(Difference(0.0, 1.0, 1e-6, "a")).exceeds(replace(column, by_norm=True), "float32")


def test_documents_alone_are_those_of_the_packed_rows() -> None:
    packed, alone = (rows_of(0, 6, 264, alone=is_alone) for is_alone in (False, True))
    assert packed.packed
    assert not alone.packed

    def targets(batch: Any) -> list[tuple[int, int, int]]:
        """(token, position in its document, label) wherever there is a target."""
        has = batch.labels_BT != -100
        return sorted(zip(batch.tokens_BT[has].tolist(), batch.position_BT[has].tolist(), batch.labels_BT[has].tolist(), strict=True))

    assert targets(packed) == targets(alone)
    assert len(alone.tokens_BT) == 6 + 0 + 1 + 2 + 0 + 1 + 2


def test_rows_and_columns_cover_what_is_registered_and_have_one_name_each() -> None:
    names = [row.name for row in rows()]
    assert len(set(names)) == len(names)
    assert {"absolute learned", "relative alibi", "norm layernorm", "channel swiglu", "residual sandwich"} <= set(names)
    by_name = {column.name: column for column in columns()}
    assert len(by_name) == len(columns())
    compiled = {"AC memory budget", "compile", "compile, inductor", "compile, TP2", "compile, AC selective, CP2"}
    assert {name for name, column in by_name.items() if column.compiles} == compiled
    assert all(column.n_processes in (1, 2, 4) for column in by_name.values())
    assert Row("x", {}, reasons={"CP2 *": "why"}).reason("CP2 ring") == "why"
    assert Row("x", {}, reasons={"CP2 *": "why"}).reason("TP2") is None
