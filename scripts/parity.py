"""The parity matrix: every component under every technique against one process, eager and in fp32.

python scripts/parity.py                                          all cells; writes docs/parity.md
python scripts/parity.py --rows 'relative *' --columns 'CP2 *' TP2    some; prints the table
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.parity.columns import FLOAT8_BOUND, FLOAT8_LOSS_BOUND, FP32_BOUND, FP64_BOUND, Column, columns  # noqa: E402
from tests.parity.matrix import Matrix, read_cells, selected, to_json  # noqa: E402
from tests.parity.measure import LEAST_SHARE  # noqa: E402
from tests.parity.rows import D_FF, D_MODEL, N_HEADS, SEQ_LEN, rows  # noqa: E402
from tests.parity.trial import N_ROWS, N_STEPS  # noqa: E402

PAGE = """# Parity

What stands here is measured, not claimed: each row is a component, each column a way to run it, and each cell the largest
difference from the same run on one process, eager, in fp32. `python scripts/parity.py` measures it again and writes this
page; `--rows` and `--columns` take globs and select.

Each cell trains {n_steps} steps of a model of 2 blocks, width {d_model}, {n_heads} heads, {d_ff} hidden units, on {n_rows} rows
of {seq_len} tokens that pack up to three documents each, with AdamW, clipping and a z-loss, through the code that
`titanarch train` runs: checks, layout, weights by name, the training step. A cell shows the larger of two numbers:

- the loss: the largest relative difference of the {n_steps} steps, summed over all processes;
- the gradients of the first step: for each tensor max|Δg| / max(max|g|, {least:g} · global RMS of the gradients), and of all tensors
  the largest. A gradient that is truly zero (of key biases, of what shifts all logits of a softmax alike) holds rounding only,
  whose size is that of the other gradients: tensors that are zero in float64 count against the global RMS itself.

Bounds: {fp32:g} for both; rows that need more to round have it after their name. For float8 they are {loss8:g} (loss) and
{grad8:g} (all gradients as one vector: norm of the difference over norm), because its numbers have 3 bits of fraction in the
forward and 2 in the backward. In float64 (`--dtype float64`) the bound is {fp64:g}. A number in bold is beyond its bound. A
number in brackets is the reason why a cell is empty, below the tables: what the configuration check answers, in its words,
or why there is nothing to compare.

What the columns do beside what their names say: TP2, CP2, FSDP2 and HSDP are degrees of tensor, context and data
parallelism; `packing` trains on each document in a row of its own and compares with the rows that pack them;
`resumed: A to B` makes step 1 under A, saves a checkpoint, and makes steps 2 and 3 from it under B; `accumulation` cuts a
step into micro-batches of one row; `compile` uses aot_eager, which traces and divides
a graph as inductor does, but where the name says inductor; the memory budget is inductor's too.

{table}
{n_measured} cells measured and {n_empty} empty with a reason, in {minutes:.0f} minutes on {n_processes} processes at a time,
{processor_minutes:.0f} minutes of processor time; torch {torch}, Python {python}.
"""


def page(matrix: Matrix, *, minutes: float, n_processes: int) -> str:
    """docs/parity.md."""
    return PAGE.format(
        n_steps=N_STEPS,
        d_model=D_MODEL,
        n_heads=N_HEADS,
        d_ff=D_FF,
        n_rows=N_ROWS,
        seq_len=SEQ_LEN,
        least=LEAST_SHARE,
        fp32=FP32_BOUND,
        fp64=FP64_BOUND,
        loss8=FLOAT8_LOSS_BOUND,
        grad8=FLOAT8_BOUND,
        table=matrix.markdown(),
        n_measured=sum(cell.difference is not None for cell in matrix.cells.values()),
        n_empty=sum(bool(cell.reason) for cell in matrix.cells.values()),
        minutes=minutes,
        processor_minutes=matrix.processor_seconds / 60,
        n_processes=n_processes,
        torch=torch.__version__.split("+")[0],
        python=platform.python_version(),
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="GLOB", help="rows to run")
    parser.add_argument("--columns", nargs="+", default=["*"], metavar="GLOB", help="columns to run")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of weights and compute")
    parser.add_argument("--processes", type=int, default=4, help="at most so many at a time; columns of 4 need 4")
    parser.add_argument("--out", type=Path, help="where to write the page; unset: docs/parity.md where all cells are measured in float32")
    parser.add_argument("--store", type=Path, help="a file of measured cells: those in it are not run again, others are added to it")
    parser.add_argument("--list", action="store_true", help="print the names of rows and columns, and end")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """0 where every cell is within its bound, 1 where one is not, 2 where nothing is selected."""
    args = parse(argv)
    chosen_rows = [row for row in rows() if selected(row.name, args.rows)]
    chosen_columns = [column for column in columns() if selected(column.name, args.columns)]
    if not chosen_rows or not chosen_columns:
        print("no row, or no column, has such a name; --list shows them", file=sys.stderr)
        return 2
    if args.list:
        print("rows:", *(f"  {row.name}" for row in chosen_rows), "columns:", *(f"  {column.name}" for column in chosen_columns), sep="\n")
        return 0
    matrix, started = Matrix(chosen_rows, chosen_columns, args.dtype), time.monotonic()
    if args.store is not None and args.store.is_file():
        matrix.cells |= read_cells(args.store.read_text("utf-8"))

    def say(row: str, column: Column) -> None:
        print(matrix.line(row, column), file=sys.stderr, flush=True)
        if args.store is not None:
            with args.store.open("a", encoding="utf-8") as file:
                file.write(to_json(row, column.name, matrix.cells[row, column.name]) + "\n")

    matrix.measure(n_processes=args.processes, say=say)
    minutes = (time.monotonic() - started) / 60
    print(matrix.markdown())
    is_whole = len(chosen_rows) == len(rows()) and len(chosen_columns) == len(columns()) and args.dtype == "float32"
    out = args.out or (ROOT / "docs" / "parity.md" if is_whole else None)
    if out is not None:
        out.write_text(page(matrix, minutes=minutes, n_processes=args.processes), "utf-8")
    failures = matrix.failures()
    spent = f"{minutes:.1f} minutes, {matrix.processor_seconds / 60:.1f} of processor time"
    print(f"{len(matrix.cells)} cells in {spent}; {len(failures)} beyond their bounds or failed", *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
