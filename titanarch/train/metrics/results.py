"""The table at the end of a run, on stdout, from the same mapping that ``result.json`` holds.

The mapping's scalars are shown in their order, one a line, then ``losses`` (name -> nats a token), ``environment``'s
device and commit, and ``evaluation``: a list of flat mappings, one a row of the table (``length``, ``rule``, ``loss``,
``perplexity``, ...), whose columns are all their keys in the order of first appearance.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from titanarch.train.metrics.progress import clock_text

PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def counted(value: float) -> str:
    """A large count with a unit prefix: 4.10 T."""
    for size, prefix in PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.2f} {prefix}"
    return f"{value:,.0f}"


def shown_value(key: str, value: object) -> str:
    """A value in the unit that its key names."""
    if value is None:
        return "not finite"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if "flops" in key:
        return f"{counted(value)}FLOP" if value >= PREFIXES[-1][0] else f"{counted(value)} FLOP"
    if key.endswith("_seconds"):
        return clock_text(value) if value >= 60 else f"{value:.2f} s"
    if key == "mfu" or key.endswith("_mfu"):
        return f"{100 * value:.1f} %"
    if key.endswith("_gib"):
        return f"{value:.2f} GiB"
    if isinstance(value, int) or key.endswith("_per_second"):
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"


def heading(key: str) -> str:
    """A key as a person reads it; the unit stands with the value."""
    return key.removesuffix("_seconds").removesuffix("_gib").replace("_", " ")


def summary_lines(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of everything but the evaluation."""
    lines = [(heading(key), shown_value(key, value)) for key, value in result.items() if not isinstance(value, (Mapping, list, tuple))]
    losses: Mapping[str, Any] = result.get("losses", {})
    lines += [(f"{heading(name)} loss", shown_value("loss", value)) for name, value in losses.items()]
    source_epochs: Mapping[str, float] = result.get("source_epochs", {})
    lines += [(f"epochs of {name}", shown_value("epochs", value)) for name, value in source_epochs.items()]
    environment: Mapping[str, Any] = result.get("environment", {})
    lines += [(key, str(environment[key])) for key in ("device", "commit") if key in environment]
    return lines


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as aligned columns under their headings; words to the left, numbers to the right."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[shown_value(key, row[key]) if key in row else "" for key in keys] for row in rows]
    is_word = [any(isinstance(row.get(key), str) for row in rows) for key in keys]
    headings = [heading(key) for key in keys]
    widths = [max(len(line[i]) for line in [headings, *cells]) for i in range(len(keys))]

    def aligned(line: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if word else cell.rjust(width) for cell, width, word in zip(line, widths, is_word, strict=True)
        ).rstrip()

    return [aligned(headings), "  ".join("-" * width for width in widths), *map(aligned, cells)]


def format_result(result: Mapping[str, Any]) -> str:
    """The whole table as text, alike on a terminal and in a file."""
    lines = summary_lines(result)
    width = max((len(name) for name, _ in lines), default=0)
    text = [f"{name.ljust(width)}  {value}" for name, value in lines]
    evaluation: Sequence[Mapping[str, Any]] = result.get("evaluation", ())
    if evaluation:
        text += ["", *table_lines(evaluation)]
    return "\n".join(text) + "\n"


def print_result(result: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print the table on stdout, or on ``stream``. Call on process 0 after the metrics are closed."""
    out = sys.stdout if stream is None else stream
    out.write(format_result(result))
    out.flush()
