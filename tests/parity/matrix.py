"""The matrix: which cells run, what came of them, and the page that shows it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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

    def exceeds(self, bounds: tuple[float, float]) -> bool:
        """Whether it broke, or is further from one process than ``bounds`` of loss and gradient allow."""
        if self.difference is None:
            return bool(self.failure)
        return self.difference.loss > bounds[0] or self.difference.gradient > bounds[1]


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
    processor_seconds: float = 0.0

    def measure(self, *, n_processes: int = 4, say: Callable[[str], None] = print) -> None:
        """Run every cell on at most ``n_processes`` processes; ``say`` gets a line a cell."""
        references = _References(self.dtype)
        waiting: list[tuple[Task, Reply]] = []

        def report(task: Task, reply: Reply) -> None:
            row, column, seconds = task.row.name, task.column, reply.processor_seconds
            self.processor_seconds += seconds
            is_reference = column.name == REFERENCE.name
            if reply.outcome is None:
                refused = reply.state == "refused" and not is_reference
                self.cells[row, column.name] = Cell(**{"reason" if refused else "failure": reply.text}, seconds=seconds)
                say(self.line(row, column))
            elif is_reference:
                references.add(task, reply.outcome)
            else:
                waiting.append((task, reply))
            for done, its in [item for item in waiting if references.has(item[0].row.name)]:
                waiting.remove((done, its))
                assert its.outcome is not None, "only what ran waits"
                found = difference(its.outcome, *references.of(done.row.name))
                self.cells[done.row.name, done.column.name] = Cell(found, seconds=its.processor_seconds)
                say(self.line(done.row.name, done.column))

        run_cells([*references.tasks(self.rows), *self._tasks()], n_processes=n_processes, report=report)
        for task, _ in waiting:
            failure = "one process failed, so there is nothing to compare with"
            self.cells[task.row.name, task.column.name] = Cell(failure=failure)

    def _tasks(self) -> list[Task]:
        """The cells to run; the others get their reason."""
        tasks = []
        for row in self.rows:
            for column in self.columns:
                if self.wanted is not None and not self.wanted(row, column):
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
            shown = f"loss {d.loss:.1e}, gradients {d.gradient:.1e} ({d.where})"
        mark = "EXCEEDS " if cell.exceeds(column.bounds(self.dtype)) else ""
        return f"{cell.seconds:6.1f} s  {row} | {column.name}: {mark}{shown}"

    def failures(self) -> list[str]:
        """A line for each cell that exceeds its bounds, or broke."""
        known = {column.name: column for column in (REFERENCE, *self.columns)}
        return [
            self.line(row, known[column]) for (row, column), cell in self.cells.items() if cell.exceeds(known[column].bounds(self.dtype))
        ]

    def markdown(self) -> str:
        """A table for each group of columns, and the reasons of empty cells."""
        reasons: dict[str, int] = {}
        parts = []
        for group in dict.fromkeys(column.group for column in self.columns):
            columns = [column for column in self.columns if column.group == group]
            lines = [f"| {group} | " + " | ".join(column.name for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
            for row in self.rows:
                shown = [self._shown(self.cells.get((row.name, column.name)), column, reasons) for column in columns]
                lines.append(f"| {row.name} | " + " | ".join(shown) + " |")
            lines.append("| largest | " + " | ".join(self._largest(column) for column in columns) + " |")
            parts.append("\n".join(lines))
        if reasons:
            parts.append("Empty cells:\n\n" + "\n".join(f"{number}. {reason}" for reason, number in reasons.items()))
        return "\n\n".join(parts) + "\n"

    def _shown(self, cell: Cell | None, column: Column, reasons: dict[str, int]) -> str:
        if cell is None:
            return ""
        if cell.difference is None:
            return f"({reasons.setdefault(cell.reason, len(reasons) + 1)})" if cell.reason else "**failed**"
        number = f"{cell.difference.largest:.1e}"
        return f"**{number}**" if cell.exceeds(column.bounds(self.dtype)) else number

    def _largest(self, column: Column) -> str:
        found = [cell.difference.largest for (_, name), cell in self.cells.items() if name == column.name and cell.difference]
        return f"{max(found):.1e}" if found else ""


def selected(names: str, patterns: Sequence[str]) -> bool:
    """Whether one of the globs names it."""
    return any(fnmatchcase(names, pattern) for pattern in patterns)
