"""What is wrong with data, said to the user."""

from pathlib import Path

from titanarch.config.errors import ConfigError, Problem


class DataError(ConfigError):
    """Data on disk or behind a URL is missing, damaged or does not fit the run. The message names file and line."""


def data_error(message: str, *, file: str | Path | None = None, line: int | None = None, key: str = "") -> DataError:
    """A DataError of one problem; ``line`` counts from 1."""
    return DataError(Problem(message, key=key, file=file, line=line))
