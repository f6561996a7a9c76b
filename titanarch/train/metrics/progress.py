"""The sink ``progress``: what a person watches, on stderr."""

import importlib
import sys
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from titanarch.config.registry import ComponentConfig
from titanarch.train.metrics.rows import Row
from titanarch.train.metrics.sink import SINKS, Sink, SinkConfig, SinkContext

REFRESH_SECONDS = 0.2
"""Drawing the live line takes about a millisecond; at this pace it costs a run less than 1 %."""


def clock_text(seconds: float) -> str:
    """Seconds as h:mm:ss, with days in front where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


def training_line(row: Row, step: int, *, total_steps: int | None) -> str:
    """Step, loss, tokens/s, MFU, memory, gradient norm, learning rate and ETA; what a row lacks is left out."""
    parts = [f"step {step}" if total_steps is None else f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    parts += [f"loss {row['loss']:.4f}"] if "loss" in row else []
    parts += [f"{row['tokens_per_second']:,.0f} tok/s"] if "tokens_per_second" in row else []
    parts += [f"MFU {100 * row['mfu']:.1f} %"] if "mfu" in row else []
    parts += [f"{row['memory_gib']:.2f} GiB"] if "memory_gib" in row else []
    parts += [f"grad {row['grad_norm']:.3g}"] if "grad_norm" in row else []
    parts += [f"lr {row['lr']:.3g}"] if "lr" in row else []
    parts += [f"skipped {row['skipped_steps']:.0f}"] if row.get("skipped_steps") else []
    parts += [f"ETA {clock_text(row['eta_seconds'])}"] if "eta_seconds" in row else []
    return "  ".join(parts)


def validation_line(row: Row, step: int) -> str:
    """Every loss of a validation row, by name."""
    losses = [f"{key.replace('_', ' ')} {value:.4f}" for key, value in row.items() if key.endswith("_loss")]
    return "  ".join([f"step {step}", *losses])


class ProgressConfig(SinkConfig):
    """One live line on a terminal, plain lines elsewhere, on stderr. It has no keys."""


@SINKS.register("progress")
class ProgressSink(Sink):
    """On a terminal the training line is redrawn in place, and validations and events scroll by above it.

    Elsewhere every row is a line of its own. ``TERM=dumb`` counts as no terminal.
    """

    Config: ClassVar[type[ComponentConfig]] = ProgressConfig
    requires: ClassVar[Mapping[str, str]] = {"rich": "pip install rich"}

    def __init__(self, config: ProgressConfig) -> None:
        self._live: Any = None
        self._text: Any = None
        self._console: Any = None
        self._total_steps: int | None = None
        self._line = ""
        self._drawn = 0.0

    def open(self, context: SinkContext) -> None:
        self._total_steps = context.total_steps
        if not sys.stderr.isatty():
            return
        self._text = importlib.import_module("rich.text").Text
        console = importlib.import_module("rich.console").Console(stderr=True)
        if console.is_dumb_terminal:
            return
        self._console = console
        # Standard output that goes to a file must not be drawn on the terminal's stderr.
        self._live = importlib.import_module("rich.live").Live(
            self._text(""), console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty()
        )
        self._live.start()

    def log(self, row: Row, step: int) -> None:
        if "loss" not in row:
            if any(key.endswith("_loss") for key in row):
                self.event(validation_line(row, step))
            return  # the times of a save are said by an event
        self._line = training_line(row, step, total_steps=self._total_steps)
        if self._live is None:
            print(self._line, file=sys.stderr, flush=True)
        elif time.monotonic() - self._drawn >= REFRESH_SECONDS:
            self._draw()

    def event(self, message: str) -> None:
        if self._live is None:
            print(message, file=sys.stderr, flush=True)
        else:
            self._console.print(self._text(message))

    def close(self, result: Mapping[str, Any] | None) -> None:
        if self._live is not None:
            self._draw()
            self._live.stop()
            self._live = None

    def _draw(self) -> None:
        line = self._text(self._line, no_wrap=True, overflow="ellipsis")
        self._live.update(line, refresh=True)
        self._drawn = time.monotonic()
