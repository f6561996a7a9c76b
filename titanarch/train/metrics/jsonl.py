"""The sink ``jsonl``: ``metrics.jsonl`` in the run folder, which everything above training reads."""

from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar

from titanarch.config.errors import ConfigError
from titanarch.config.registry import ComponentConfig
from titanarch.train.metrics.files import writing
from titanarch.train.metrics.rows import Row, encode_row
from titanarch.train.metrics.sink import SINKS, Sink, SinkConfig, SinkContext

METRICS_FILE = "metrics.jsonl"


class JsonlConfig(SinkConfig):
    """``metrics.jsonl``, one object a logged step. It has no keys."""


@SINKS.register("jsonl")
class JsonlSink(Sink):
    """Appends each row with one unbuffered write, so that a killed run loses at most the row being written."""

    Config: ClassVar[type[ComponentConfig]] = JsonlConfig

    def __init__(self, config: JsonlConfig) -> None:
        self._path = Path()
        self._file: FileIO | None = None

    def open(self, context: SinkContext) -> None:
        """Raises ConfigError when the file cannot be opened."""
        self._path = context.run_dir / METRICS_FILE
        with writing(self._path):
            self._file = FileIO(self._path, "a")

    def log(self, row: Row, step: int) -> None:
        """Raises ConfigError when the disk is full; the torn line is dropped when the run resumes."""
        assert self._file is not None, "the sink is not open"
        line = encode_row(row)
        with writing(self._path):
            n_written = self._file.write(line)
        if n_written != len(line):
            raise ConfigError(f"{self._path}: the disk is full; make room and start again: the same command resumes")

    def close(self, result: Mapping[str, Any] | None) -> None:
        if self._file is not None:
            self._file.close()
