"""The sink ``plot``: ``training_loss.png`` in the run folder."""

import importlib
import io
import math
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from titanarch.config.registry import ComponentConfig
from titanarch.train.metrics.files import atomic_write
from titanarch.train.metrics.jsonl import METRICS_FILE
from titanarch.train.metrics.rows import Row, read_rows
from titanarch.train.metrics.sink import SINKS, Sink, SinkConfig, SinkContext

PLOT_FILE = "training_loss.png"
MAX_POINTS = 2000
REDRAW_SECONDS = 30.0
"""A drawing takes a few tenths of a second; at validations it is made no more often than this."""


@dataclass
class Curve:
    """Losses against steps and tokens, 8 bytes a number."""

    step: "array[float]" = field(default_factory=lambda: array("d"))
    tokens: "array[float]" = field(default_factory=lambda: array("d"))
    loss: "array[float]" = field(default_factory=lambda: array("d"))

    def add(self, row: Row, key: str) -> None:
        """Append ``row[key]``; a loss that is not finite has no place on the axis."""
        if math.isfinite(row[key]):
            self.step.append(row["step"])
            self.tokens.append(row.get("tokens", math.nan))
            self.loss.append(row[key])


def block_means(values: "array[float]", n_points: int) -> npt.NDArray[np.float64]:
    """At most ``n_points`` values: means of equal runs of consecutive ones (the last may be shorter)."""
    numbers = np.asarray(values, dtype=np.float64)
    size = -(-len(numbers) // n_points) if len(numbers) else 1
    starts = np.arange(0, len(numbers), size)
    counts = np.diff(np.append(starts, len(numbers)))
    return np.add.reduceat(numbers, starts) / counts if len(numbers) else numbers


class PlotConfig(SinkConfig):
    """``training_loss.png``: training and validation losses. It has no keys."""


@SINKS.register("plot")
class PlotSink(Sink):
    """Draws at validations and at the end; a resumed run's picture holds its earlier starts too."""

    Config: ClassVar[type[ComponentConfig]] = PlotConfig
    requires: ClassVar[Mapping[str, str]] = {"matplotlib": "pip install matplotlib"}

    def __init__(self, config: PlotConfig) -> None:
        self._run_dir = Path()
        self._name = ""
        self._train = Curve()
        self._validation: dict[str, Curve] = {}
        self._drawn = 0.0

    def open(self, context: SinkContext) -> None:
        self._run_dir, self._name = context.run_dir, context.name
        self._drawn = time.monotonic()
        metrics = context.run_dir / METRICS_FILE
        if context.start_step > 0 and metrics.exists():
            for row in read_rows(metrics):
                self._take(row)

    def log(self, row: Row, step: int) -> None:
        self._take(row)
        if "validation_loss" in row and time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self._draw()

    def close(self, result: Mapping[str, Any] | None) -> None:
        if self._train.loss or self._validation:
            self._draw()

    def _take(self, row: Row) -> None:
        if "validation_loss" in row:
            for key in row:
                if key.endswith("_loss"):
                    self._validation.setdefault(key, Curve()).add(row, key)
        elif "loss" in row:
            self._train.add(row, "loss")

    def _draw(self) -> None:
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(8, 5), layout="constrained")
        # The canvas is named, not taken from pyplot, so neither a display nor the user's backend is touched.
        canvas = importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        n_rows = len(self._train.loss)
        label = "train" if n_rows <= MAX_POINTS else f"train (means of {-(-n_rows // MAX_POINTS)} rows)"
        if n_rows:
            axes.plot(block_means(self._train.step, MAX_POINTS), block_means(self._train.loss, MAX_POINTS), label=label, linewidth=1)
        for key, curve in self._validation.items():
            axes.plot(curve.step, curve.loss, label=key.removesuffix("_loss").replace("_", " "), marker="o", markersize=3)
        axes.set(xlabel="step", ylabel="loss (nats a token)", title=self._name)
        axes.grid(alpha=0.3)
        axes.legend()
        self._add_token_axis(axes)
        image = io.BytesIO()
        canvas.print_png(image)
        atomic_write(self._run_dir / PLOT_FILE, image.getvalue())
        self._drawn = time.monotonic()

    def _add_token_axis(self, axes: Any) -> None:
        """Tokens along the top, read off the rows: steps need not be equally large."""
        longest = max((self._train, *self._validation.values()), key=lambda curve: len(curve.step))
        pairs = {step: tokens for step, tokens in zip(longest.step, longest.tokens, strict=True) if math.isfinite(tokens)}
        if len(pairs) < 2:
            return
        step = np.array(list(pairs))
        tokens = np.array(list(pairs.values()))

        def to_tokens(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return line_through(x, step, tokens)

        def to_steps(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return line_through(x, tokens, step)

        axes.secondary_xaxis("top", functions=(to_tokens, to_steps)).set_xlabel("tokens")


def line_through(x: npt.NDArray[np.float64], xs: npt.NDArray[np.float64], ys: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The line through the increasing points (xs, ys), going on straight beyond them with their mean slope."""
    slope = (ys[-1] - ys[0]) / (xs[-1] - xs[0])
    inside = np.interp(x, xs, ys)
    return inside + slope * (np.minimum(np.asarray(x) - xs[0], 0) + np.maximum(np.asarray(x) - xs[-1], 0))
