"""Several sources in shares of tokens."""

from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Strict, model_validator

from titanarch.config.registry import ComponentConfig
from titanarch.config.section import ListOf, Section
from titanarch.data.sources.base import SOURCES, Source, SourceConfig

Knot = Annotated[tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0, allow_inf_nan=False)]], Strict(False)]


class MixedSourceConfig(Section):
    """One source of a mixture."""

    source: Annotated[ComponentConfig, SOURCES] = Field(description="where its documents come from; no mixture")
    name: str = Field("", description="its name in logs; empty: its kind and its place, from 0")
    weight: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="its share of the tokens, relative to the other weights; unset: see schedule"
    )
    schedule: ListOf[Knot] = Field((), description="[[row of the run, weight], ...] from row 0 on: linear between, the last one stays")
    at_end: Literal["repeat", "stop", "drop"] = Field(
        "repeat",
        description="when each of its rows was used: repeat: in a new order; stop: the run ends; drop: the other sources take its share",
    )

    @model_validator(mode="after")
    def _one_weight(self) -> "MixedSourceConfig":
        if isinstance(self.source, MixtureConfig):
            raise ValueError("source: a mixture in a mixture; give its sources here, their weights multiplied")
        if (self.weight is None) == (not self.schedule):
            raise ValueError("give either weight or schedule")
        rows = [row for row, _ in self.schedule]
        if rows and (rows[0] != 0 or sorted(set(rows)) != rows):
            raise ValueError(f"schedule: rows {rows} do not rise from 0")
        return self

    @property
    def knots(self) -> tuple[tuple[int, float], ...]:
        """(row, weight), linear between and constant after the last."""
        return self.schedule if self.weight is None else ((0, self.weight),)


class MixtureConfig(SourceConfig):
    """Several sources, each with a share of the tokens."""

    sources: ListOf[MixedSourceConfig] = Field(min_length=1, description="the sources")

    @model_validator(mode="after")
    def _names_and_weights(self) -> "MixtureConfig":
        if len(set(self.names)) < len(self.sources):
            raise ValueError(f"sources: names must differ, and are {', '.join(self.names)}")
        for row in sorted({row for source in self.sources for row, _ in source.knots}):
            if not any(weight_at(source.knots, row) for source in self.sources):
                raise ValueError(f"sources: every weight is 0 at row {row}; some source must have one")
        return self

    @property
    def names(self) -> list[str]:
        """Of the sources, in logs."""
        return [source.name or f"{source.source.kind}-{i}" for i, source in enumerate(self.sources)]


def weight_at(knots: tuple[tuple[int, float], ...], row: float) -> float:
    """The weight at a row: linear between ``knots``, (row, weight) in order; that of the last one after it."""
    for (first, weight), (last, next_weight) in pairwise(knots):
        if row < last:
            return weight + (next_weight - weight) * (row - first) / (last - first)
    return knots[-1][1]


@SOURCES.register("mixture")
class MixtureSource(Source):
    """The mixture itself has no documents; its sources are opened one by one."""

    Config: ClassVar[type[ComponentConfig]] = MixtureConfig
