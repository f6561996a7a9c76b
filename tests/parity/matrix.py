"""The matrix: which cells run, what came of them, and the page that shows it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase

from tests.parity.columns import REFERENCE, Column
from tests.parity.measure import Difference, difference, zero_gradients
from tests.parity.rows import Row
from tests.parity.teams import Reply, Task, run_cells
from tests.parity.trial import Outcome

Key = tuple[str, str]
"""Names of row and column."""


@dataclass(frozen=True)
class Cell:
    """``difference``: from one process. ``reason``: why there is none. ``failure``: what broke. ``seconds``: of processors."""

    difference: Difference | None = None
    reason: str = ""
    failure: str = ""
    seconds: float = 0.0

    def numbers(self, column: Column) -> tuple[float, float]:
        """Of loss and gradients, as ``column`` compares them."""
        assert self.difference is not None, "only a cell that was measured has them"
        return self.difference.loss, self.difference.gradient_norm if column.by_norm else self.difference.gradient

    def exceeds(self, column: Column, dtype: str, *, at_least: float = 0.0) -> bool:
        """Whether it broke, or is further from one process than the bounds of its column, or ``at_least`` in fp32.

        Where gradients are compared as one vector, ``at_least`` is of them alone.
        """
        if self.difference is None:
            return bool(self.failure)
        (loss, gradient), (loss_bound, gradient_bound) = self.numbers(column), column.bounds(dtype)
        if dtype == "float32":
            loss_bound = loss_bound if column.by_norm else max(loss_bound, at_least)
            gradient_bound = max(gradient_bound, at_least)
        return loss > loss_bound or gradient > gradient_bound


class _References:
    """What one process does, by row: in the dtype of the matrix, and in float64 to know which gradients are zero."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.expected: dict[str, Outcome] = {}
        self.zero: dict[str, frozenset[str]] = {}

    def tasks(self, rows: Sequence[Row]) -> list[Task]:
        return [Task(row, REFERENCE, dtype) for dtype in sorted({self.dtype, "float64"}) for row in rows]

    def add(self, task: Task, outcome: Outcome) -> None:
        if task.dtype == self.dtype:
            self.expected[task.row.name] = outcome
        if task.dtype == "float64":
            self.zero[task.row.name] = zero_gradients(outcome)

    def has(self, row: str) -> bool:
        return row in self.expected and row in self.zero

    def of(self, row: str) -> tuple[Outcome, frozenset[str]]:
        return self.expected[row], self.zero[row]


@dataclass
class Matrix:
    """Rows by columns; ``measure`` fills ``cells``. ``wanted``: which cells to run, all where it is None."""

    rows: Sequence[Row]
    columns: Sequence[Column]
    dtype: str = "float32"
    wanted: Callable[[Row, Column], bool] | None = None
    cells: dict[Key, Cell] = field(default_factory=dict)

    @property
    def processor_seconds(self) -> float:
        """Of all cells; what one process did to compare with is not counted."""
        return sum(cell.seconds for cell in self.cells.values())

    def measure(self, *, n_processes: int = 4, say: Callable[[str, Column], None] | None = None) -> None:
        """Run every cell that ``cells`` lacks, on at most ``n_processes`` processes.

        ``say`` is called with the row and column of each as it comes.
        """
        say = say or (lambda row, column: print(self.line(row, column)))
        references = _References(self.dtype)
        waiting: list[tuple[Task, Reply]] = []

        def report(task: Task, reply: Reply) -> None:
            row, column, seconds = task.row.name, task.column, reply.processor_seconds
            is_reference = column.name == REFERENCE.name
            if reply.outcome is None:
                refused = reply.state == "refused" and not is_reference
                self.cells[row, column.name] = Cell(**{"reason" if refused else "failure": reply.text}, seconds=seconds)
                say(row, column)
            elif is_reference:
                references.add(task, reply.outcome)
            else:
                waiting.append((task, reply))
            for done, its in [item for item in waiting if references.has(item[0].row.name)]:
                waiting.remove((done, its))
                assert its.outcome is not None, "only what ran waits"
                found = difference(its.outcome, *references.of(done.row.name))
                self.cells[done.row.name, done.column.name] = Cell(found, seconds=its.processor_seconds)
                say(done.row.name, done.column)

        tasks = self._tasks()
        compared = [row for row in self.rows if any(task.row.name == row.name for task in tasks)]
        run_cells([*references.tasks(compared), *tasks], n_processes=n_processes, report=report)
        for task, _ in waiting:
            failure = "one process failed, so there is nothing to compare with"
            self.cells[task.row.name, task.column.name] = Cell(failure=failure)

    def _tasks(self) -> list[Task]:
        """The cells to run; the others get their reason."""
        tasks = []
        for row in self.rows:
            for column in self.columns:
                is_known = (row.name, column.name) in self.cells
                if is_known or (self.wanted is not None and not self.wanted(row, column)):
                    continue
                reason = row.reason(column.name) or column.reason(row.name)
                if reason is None:
                    tasks.append(Task(row, column, self.dtype))
                else:
                    self.cells[row.name, column.name] = Cell(reason=reason)
        return tasks

    def line(self, row: str, column: Column) -> str:
        """A cell in a line."""
        cell = self.cells[row, column.name]
        shown = cell.reason or cell.failure
        if cell.difference is not None:
            d = cell.difference
            shown = f"loss {d.loss:.1e}, gradients {d.gradient:.1e} ({d.where}), norm {d.gradient_norm:.1e}"
        mark = "EXCEEDS " if self.exceeds(row, column) else ""
        return f"{cell.seconds:6.1f} s  {row} | {column.name}: {mark}{shown}"

    def failures(self) -> list[str]:
        """A line for each cell that exceeds its bounds, or broke."""
        known = {column.name: column for column in (REFERENCE, *self.columns)}
        return [self.line(row, known[column]) for row, column in self.cells if self.exceeds(row, known[column])]

    def exceeds(self, row: str, column: Column) -> bool:
        """Whether a cell broke, or is beyond its bounds."""
        at_least = next((its.bound(column.name) for its in self.rows if its.name == row), 0.0)
        return self.cells[row, column.name].exceeds(column, self.dtype, at_least=at_least)

    def markdown(self) -> str:
        """A table for each group of columns, and the reasons of empty cells."""
        reasons: dict[str, int] = {}
        parts = []
        for group in dict.fromkeys(column.group for column in self.columns):
            columns = [column for column in self.columns if column.group == group]
            lines = [f"| {group} | " + " | ".join(column.name for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
            for row in self.rows:
                shown = [self._shown(row.name, column, reasons) for column in columns]
                wider = ", ".join(f"{name.removeprefix('*') or 'bound'} {bound:g}" for name, bound in row.bounds.items())
                lines.append(f"| {row.name}{f' ({wider})' if wider else ''} | " + " | ".join(shown) + " |")
            lines.append("| largest | " + " | ".join(self._largest(column) for column in columns) + " |")
            parts.append("\n".join(lines))
        if reasons:
            parts.append("Empty cells:\n\n" + "\n".join(f"{number}. {reason}" for reason, number in reasons.items()))
        return "\n\n".join(parts) + "\n"

    def _shown(self, row: str, column: Column, reasons: dict[str, int]) -> str:
        cell = self.cells.get((row, column.name))
        if cell is None:
            return ""
        if cell.difference is None:
            return f"({reasons.setdefault(cell.reason, len(reasons) + 1)})" if cell.reason else "**failed**"
        number = f"{max(cell.numbers(column)):.1e}"
        return f"**{number}**" if self.exceeds(row, column) else number

    def _largest(self, column: Column) -> str:
        found = [max(cell.numbers(column)) for (_, name), cell in self.cells.items() if name == column.name and cell.difference]
        return f"{max(found):.1e}" if found else ""


def to_json(row: str, column: str, cell: Cell) -> str:
    """A cell in a line, for a file that a later run goes on from."""
    return json.dumps({"row": row, "column": column, **asdict(cell)})


def read_cells(text: str) -> dict[Key, Cell]:
    """The cells that were measured or refused; those that failed are left to be run again."""
    cells: dict[Key, Cell] = {}
    for line in text.splitlines():
        table = json.loads(line)
        key, found = (table.pop("row"), table.pop("column")), table.pop("difference")
        if found or table["reason"]:
            cells[key] = Cell(Difference(**found) if found else None, **table)
    return cells


def selected(names: str, patterns: Sequence[str]) -> bool:
    """Whether one of the globs names it."""
    return any(fnmatchcase(names, pattern) for pattern in patterns)
