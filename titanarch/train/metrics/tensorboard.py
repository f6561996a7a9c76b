"""The sink ``tensorboard``: event files for TensorBoard."""

import importlib
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from titanarch.config.registry import ComponentConfig
from titanarch.train.metrics.rows import Row
from titanarch.train.metrics.sink import SINKS, Sink, SinkConfig, SinkContext

FLUSH_SECONDS = 10
QUEUED_EVENTS = 100


class TensorboardConfig(SinkConfig):
    """TensorBoard event files."""

    folder: str = Field("tb", description="folder of the event files, inside the run folder", min_length=1)


@SINKS.register("tensorboard")
class TensorboardSink(Sink):
    """Writes a row as one event.

    It uses TensorBoard's own writer: the one in ``torch.utils.tensorboard`` makes an event of each value, about
    50 us of the loop's time apiece. After a resume TensorBoard drops the events of the steps that are run again.
    """

    Config: ClassVar[type[ComponentConfig]] = TensorboardConfig
    requires: ClassVar[Mapping[str, str]] = {"tensorboard": "pip install tensorboard"}

    def __init__(self, config: TensorboardConfig) -> None:
        self._config = config
        self._writer: Any = None
        self._event: Any = None
        self._summary: Any = None

    def open(self, context: SinkContext) -> None:
        self._event = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        writer = importlib.import_module("tensorboard.summary.writer.event_file_writer").EventFileWriter
        self._writer = writer(str(context.run_dir / self._config.folder), QUEUED_EVENTS, FLUSH_SECONDS)
        if context.start_step > 0:
            start = self._event.SessionLog(status=self._event.SessionLog.START)
            purge_step = context.start_step + 1
            self._writer.add_event(self._event.Event(wall_time=time.time(), step=purge_step, session_log=start))

    def log(self, row: Row, step: int) -> None:
        values = [self._summary.Value(tag=key, simple_value=value) for key, value in row.items() if key != "step"]
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self, result: Mapping[str, Any] | None) -> None:
        if self._writer is not None:
            self._writer.close()
