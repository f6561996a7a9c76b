"""The interface of a sink: where rows of metrics go. Only process 0 has sinks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from titanarch.config.registry import ComponentConfig, Registry
from titanarch.train.metrics.rows import Row


class SinkConfig(ComponentConfig, identity=False):
    """The table of a sink."""


@dataclass(frozen=True)
class SinkContext:
    """What a sink may know of the run when it opens.

    ``start_step`` is the loaded step, 0 for a fresh run. ``total_steps`` is None where tokens or minutes bound the run.
    ``config`` is the resolved configuration as plain tables; it never holds environment variables.
    """

    run_dir: Path
    name: str
    start_step: int = 0
    total_steps: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


class Sink(ABC):
    """Takes rows between ``open`` and ``close``. Slow or optional packages are imported in ``open``."""

    Config: ClassVar[type[ComponentConfig]]
    requires: ClassVar[Mapping[str, str]] = {}
    """Packages that ``open`` imports, each with the command that installs it; checked before launch."""

    @abstractmethod
    def __init__(self, config: Any) -> None: ...

    @abstractmethod
    def open(self, context: SinkContext) -> None:
        """Called once, before the first row; the run folder has been trimmed to ``context.start_step`` by then."""

    @abstractmethod
    def log(self, row: Row, step: int) -> None:
        """Take a training or validation row. Runs inside the training loop: it must be quick."""

    def event(self, message: str) -> None:  # noqa: B027 - most sinks have no place for a sentence
        """Take a sentence for a human (resumed, checkpoint saved, step skipped)."""

    @abstractmethod
    def close(self, result: Mapping[str, Any] | None) -> None:
        """Called once; ``result`` is that of ``result.json``, None when the run was stopped or failed."""


SINKS: Registry[Sink] = Registry("sink")
