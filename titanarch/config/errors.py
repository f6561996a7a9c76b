"""What a user reads when a configuration is wrong."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where.

    ``key`` is the dotted path in the configuration (``training.steps``); empty when no key is at fault.
    ``file`` and ``line`` (from 1) say where the value was written; None when it came from elsewhere.
    """

    message: str
    key: str = ""
    file: str | Path | None = None
    line: int | None = None

    def __str__(self) -> str:
        where = "" if self.file is None else f"{self.file}: " if self.line is None else f"{self.file}:{self.line}: "
        section, _, name = self.key.rpartition(".")
        key = f"[{section}] {name}: " if section else f"{name}: " if name else ""
        return f"{where}{key}{self.message}"


class ConfigError(Exception):
    """The user must change the configuration, the data or the command. The commands exit with status 2."""

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(Problem(p) if isinstance(p, str) else p for p in problems)
        super().__init__("\n".join(map(str, self.problems)))


def did_you_mean(wrong: str, allowed: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or the list of what is allowed when nothing is near."""
    names = sorted(set(allowed))
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else f"; allowed: {', '.join(names)}"


def shown(value: Any, limit: int = 80) -> str:
    """A value as an error shows it, cut at ``limit`` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
