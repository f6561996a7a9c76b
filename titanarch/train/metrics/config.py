"""The section [metrics]."""

import importlib.util
from typing import Annotated

from pydantic import Field, field_validator

from titanarch.config.errors import ConfigError, Problem
from titanarch.config.section import ListOf, Section
from titanarch.train.metrics.jsonl import JsonlConfig
from titanarch.train.metrics.plot import PlotConfig
from titanarch.train.metrics.progress import ProgressConfig
from titanarch.train.metrics.sink import SINKS, SinkConfig
from titanarch.train.metrics.tensorboard import TensorboardConfig
from titanarch.train.metrics.wandb import WandbConfig as WandbConfig  # registers the sink

DEFAULT_SINKS: tuple[SinkConfig, ...] = (JsonlConfig(), TensorboardConfig(), ProgressConfig(), PlotConfig())


class MetricsConfig(Section, identity=False):
    """What is logged, how often and where."""

    log_freq: int = Field(10, description="steps between logged rows; step 1 is always logged", ge=1)
    sinks: ListOf[Annotated[SinkConfig, SINKS]] = Field(
        DEFAULT_SINKS, description="where rows go: jsonl, tensorboard, progress, plot, wandb; each at most once"
    )

    @field_validator("sinks")
    @classmethod
    def _each_once(cls, sinks: tuple[SinkConfig, ...]) -> tuple[SinkConfig, ...]:
        kinds = [sink.kind for sink in sinks]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            raise ValueError(f"sink '{twice[0]}' is listed twice: list each sink once")
        return sinks

    def is_logged(self, step: int) -> bool:
        """Whether a row is due after ``step`` (steps count from 1)."""
        return step == 1 or step % self.log_freq == 0


def check_sinks(config: MetricsConfig) -> None:
    """Before launch: ConfigError that names every sink whose package is missing, and what to install."""
    problems = [
        Problem(
            f"sink '{sink.kind}' needs the package {package}, which is not installed: {install}, or leave the sink out",
            key="metrics.sinks",
        )
        for sink in config.sinks
        for package, install in SINKS.of(sink).requires.items()
        if importlib.util.find_spec(package) is None
    ]
    if problems:
        raise ConfigError(*problems)
