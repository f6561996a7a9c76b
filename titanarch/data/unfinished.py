"""A preparation that was broken off: what of it counts, and how the next one goes on.

Documents are written into ``OUT.partial``. Now and then everything written is put on the disk and ``progress.json`` says how much that
is, with checksums, and after which document; what lies beyond is cut off when the work goes on. So the result is the same bytes.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from titanarch.data.errors import data_error
from titanarch.data.index_writer import Written, put_file
from titanarch.data.skips import Skip
from titanarch.data.sources import Position
from titanarch.data.split import Record

PROGRESS = "progress.json"
PLAN = "plan.json"
LOCK = ".lock"


class Done(BaseModel):
    """What counts of a split: the files' content, the document it ends with, how many of other splits were passed over, and what
    could not be read."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    written: Written
    number: int
    file: int
    offset: int
    record: int
    passed_over: int
    skips: list[Skip]

    @property
    def last(self) -> Record:
        """The last document that counts."""
        return Record(self.number, Position(self.file, self.offset, self.record), None)


def save_progress(folder: Path, written: Written, last: Record, passed_over: int, skips: list[Skip]) -> None:
    """``written``, which is on the disk, counts from now on."""
    place, number = last.position, last.number
    done = Done(
        written=written, number=number, file=place.file, offset=place.offset, record=place.record, passed_over=passed_over, skips=skips
    )
    put_file(folder / PROGRESS, done.model_dump_json())


def load_progress(folder: Path) -> Done | None:
    """What counts in ``folder``; None where nothing does. Raises DataError where the file is damaged."""
    path = folder / PROGRESS
    try:
        return Done.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError) as error:
        message = f"is damaged; remove {folder.parent} and prepare the data anew"
        raise data_error(message, file=path) from error


@contextmanager
def resumable(out: Path, plan: Any) -> Iterator[Path]:
    """The folder to work in, which becomes ``out`` when the block ends well, and else stays for the next one if anything in it counts.

    ``plan``: JSON of what is made of what; unfinished work by another plan is refused. Raises DataError where ``out`` exists, another
    process is at it, or nothing can be written.
    """
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with FileLock(partial / LOCK, timeout=0):
            if out.exists():
                shutil.rmtree(partial)
                raise data_error("exists already: remove it or choose another --out", file=out)
            _check_plan(partial, plan)
            try:
                yield partial
            except BaseException:
                if not any(partial.glob(f"*/{PROGRESS}")) and not any(partial.glob("*/meta.json")):
                    shutil.rmtree(partial)
                raise
            (partial / PLAN).unlink()
            (partial / LOCK).unlink()
            os.replace(partial, out)
    except Timeout as error:
        raise data_error("another process is preparing this folder: wait for it, or choose another --out", file=partial) from error
    except OSError as error:
        message = f"cannot write: {error.strerror or error}; free space there and run the command again, or choose another --out"
        raise data_error(message, file=partial) from error


def _check_plan(partial: Path, plan: Any) -> None:
    path, text = partial / PLAN, json.dumps(plan)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        message = "is an unfinished preparation of other data, or with other options: finish it by its own command, or remove it"
        raise data_error(message, file=partial)
    put_file(path, text)
