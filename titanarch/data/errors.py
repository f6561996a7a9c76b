"""What is wrong with data, said to the user."""

from pathlib import Path

from titanarch.config.errors import ConfigError, Problem


class DataError(ConfigError):
    """Data on disk or behind a URL is missing, damaged or does not fit the run. The message names file and line."""


class ReplacedFile(DataError):
    """A file is not what it was when the run listed it; never skipped, because part of the old one may have been read."""


class UnreadableFile(DataError):
    """A file that cannot be read on. ``problems`` is one problem, whose ``file`` is the URL of a source's file."""


class DamagedFile(UnreadableFile):
    """The content itself is wrong, and so is alike for every process that reads it."""


class UnreachableFile(UnreadableFile):
    """The storage gave up; another process, or this one later, may be luckier."""


def data_error(
    message: str, *, file: str | Path | None = None, line: int | None = None, key: str = "", kind: type[DataError] = DataError
) -> DataError:
    """A DataError of one problem; ``line`` counts from 1."""
    return kind(Problem(message, key=key, file=file, line=line))
