"""All sinks of a run as one."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from titanarch.train.metrics.config import MetricsConfig
from titanarch.train.metrics.rows import Row
from titanarch.train.metrics.sink import SINKS, Sink, SinkContext


class MetricLog:
    """Hands rows and events to every sink. On processes other than 0 it has none, and every call returns at once."""

    def __init__(self, config: MetricsConfig, *, is_main: bool) -> None:
        self._configured: tuple[Sink, ...] = tuple(SINKS.of(sink)(sink) for sink in config.sinks) if is_main else ()
        self._open: list[Sink] = []

    def open(self, context: SinkContext) -> None:
        """Open the sinks, in the configured order; call after the run folder was trimmed to the loaded step."""
        for sink in self._configured:
            sink.open(context)
            self._open.append(sink)

    def log(self, row: Row) -> None:
        """Hand on a row; it must have ``step``."""
        if self._open:
            step = int(row["step"])
            for sink in self._open:
                sink.log(row, step)

    def event(self, message: str) -> None:
        """Hand on a sentence for a human."""
        for sink in self._open:
            sink.event(message)

    def close(self, result: Mapping[str, Any] | None = None) -> None:
        """Close every open sink, also when one of them raises; a second call does nothing."""
        sinks, self._open = self._open, []
        with ExitStack() as closing:
            for sink in reversed(sinks):
                closing.callback(sink.close, result)
