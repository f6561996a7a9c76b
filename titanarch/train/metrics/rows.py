"""Rows of metrics, and ``metrics.jsonl``, the file that holds them: one JSON object a line.

A training row has ``step, tokens, loss, grad_norm, lr, tokens_per_second, step_seconds, data_seconds, mfu,
memory_gib, eta_seconds`` and what the trainer adds (``epoch, skipped_steps``, auxiliary terms); a validation row has
``step, tokens, validation_loss`` and further ``*_loss`` keys. A checkpoint's row has ``step,
checkpoint_stall_seconds, checkpoint_upload_seconds``; it is written when the upload has ended, so rows of later steps
may stand before it. NaN and infinities are written as null and read as NaN.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from titanarch.train.metrics.files import sync_folder, writing

Row: TypeAlias = Mapping[str, float | int]


def encode_row(row: Row) -> bytes:
    """One line of ``metrics.jsonl``, its newline included. Raises TypeError on values that are no numbers."""
    for key, value in row.items():
        if not isinstance(value, (int, float)):
            raise TypeError(f"metric '{key}' is a {type(value).__name__}; log a float or an int")
    numbers = {key: value if isinstance(value, int) or math.isfinite(value) else None for key, value in row.items()}
    return (json.dumps(numbers, allow_nan=False) + "\n").encode()


def decode_row(line: bytes) -> dict[str, float | int] | None:
    """The row of one line, or None when the line is torn or is no row."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return {key: math.nan if value is None else value for key, value in row.items()}


def read_rows(path: Path) -> Iterator[dict[str, float | int]]:
    """The rows of a ``metrics.jsonl``, also while a run writes it: torn or damaged lines are passed over.

    Raises FileNotFoundError when there is no such file.
    """
    with open(path, "rb") as file:
        for line in file:
            row = decode_row(line)
            if row is not None:
                yield row


@dataclass(frozen=True)
class Trimmed:
    """What ``trim_rows`` did: rows kept, lines moved to the discarded file, whether a torn last line was dropped."""

    n_kept: int = 0
    n_discarded: int = 0
    dropped_torn_line: bool = False

    def __str__(self) -> str:
        torn = ", a torn last line dropped" if self.dropped_torn_line else ""
        return f"{self.n_kept} rows of metrics kept, {self.n_discarded} of later steps set aside{torn}"


def trim_rows(path: Path, discarded: Path, *, step: int) -> Trimmed:
    """Leave in ``path`` the rows up to ``step``; append later rows, and damaged lines, to ``discarded``.

    A last line without its newline is what a kill left of a row: it is dropped. The file is replaced in one step
    after the discarded rows are on the disk, so a kill in between loses none. Raises ConfigError when the disk is full.
    """
    if not path.exists():
        return Trimmed()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    n_kept, n_discarded, torn = 0, 0, False
    with writing(path):
        try:
            with open(path, "rb") as rows, open(temporary, "wb") as kept, open(discarded, "ab") as rest:
                for line in rows:
                    row = decode_row(line)
                    if row is not None and row["step"] <= step:
                        kept.write(line)
                        n_kept += 1
                    elif line.endswith(b"\n"):
                        rest.write(line)
                        n_discarded += 1
                    else:
                        torn = True
                for file in (rest, kept):
                    file.flush()
                    os.fsync(file.fileno())
            if n_discarded or torn:
                os.replace(temporary, path)
                sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
        if discarded.stat().st_size == 0:
            discarded.unlink()
    return Trimmed(n_kept, n_discarded, torn)
