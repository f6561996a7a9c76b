"""Writing the files of a run so that a reader, or a kill, never meets half of one."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from titanarch.config.errors import ConfigError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of writing ``path`` (disk full, no permission) into a ConfigError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written: {error.strerror or error}; make room or permit writing there, "
            "and start again: the same command resumes from the last checkpoint"
        ) from error


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content`` in one step; on the disk when this returns. Raises ConfigError."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename or a new file inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_ready(value: Any) -> Any:
    """``value`` as JSON can hold it: paths as strings, tuples as lists, NaN and infinities as null.

    Raises TypeError on anything else that JSON has no form for, tensors included.
    """
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"{type(value).__name__} has no form in JSON: give floats, ints, strings, lists and mappings")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a table as indented JSON, atomically. Raises ConfigError where the file cannot be written."""
    atomic_write(path, json.dumps(json_ready(value), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The table that ``write_json`` wrote. Raises ConfigError when it is missing, unreadable or no table."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error}); restore the file, or use another job.dump_folder") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds no JSON table; restore the file, or use another job.dump_folder")
    return value
