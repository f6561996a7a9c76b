"""A small root schema with everything that a real one has: components, nested sections, arrays, free and identity keys."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from titanarch.config.registry import ComponentConfig, Registry
from titanarch.config.section import FREE, IDENTITY, ListOf, OneOrMore, Section


class PositionConfig(ComponentConfig):
    """A position."""


POSITIONS: Registry[Any] = Registry("position")


@POSITIONS.register("alibi")
class Alibi:
    class Config(PositionConfig):
        """Linear bias."""

        slope: float = Field(1.0, gt=0, description="bias a token of distance")


@POSITIONS.register("rotary")
class Rotary:
    class Config(PositionConfig):
        """Rotation."""

        class Scaling(Section):
            factor: float = Field(1.0, description="how much longer, a ratio")

        theta: float = Field(1e4, description="base of the wavelengths, tokens")
        scaling: Scaling = Field(Scaling(), description="stretching")


@POSITIONS.register("learned")
class Learned:
    class Config(PositionConfig):
        max_length: int = Field(description="rows of the table, tokens")


class MixerConfig(ComponentConfig):
    """A mixer."""


MIXERS: Registry[Any] = Registry("mixer")


@MIXERS.register("attention")
class Attention:
    class Config(MixerConfig):
        n_heads: int = Field(8, ge=1, le=64, description="heads")
        position: OneOrMore[Annotated[PositionConfig, POSITIONS]] = Field((), description="instead of the model's")


@MIXERS.register("serial")
class Serial:
    class Config(MixerConfig):
        first: Annotated[MixerConfig, MIXERS] = Field(Attention.Config(), description="a mixer inside a mixer")


class ModelConfig(ComponentConfig):
    """The model."""


MODELS: Registry[Any] = Registry("model", key="name")


@MODELS.register("decoder")
class Decoder:
    class Config(ModelConfig):
        dim: int = Field(64, description="width, channels")
        layers: ListOf[str] = Field(("attention",), description="names of mixers", min_length=1)
        relative: Annotated[PositionConfig, POSITIONS] | ListOf[Annotated[PositionConfig, POSITIONS]] = Field(
            Alibi.Config(), description="one or several"
        )
        position: OneOrMore[Annotated[PositionConfig, POSITIONS]] = Field((), description="of every attention")
        mixers: dict[str, Annotated[MixerConfig, MIXERS]] = Field({}, description="by name")

        @model_validator(mode="before")
        @classmethod
        def _complete(cls, table: Any) -> Any:
            """A mixer's kind is its name; an attention takes the model's position."""
            if not isinstance(table, dict) or not isinstance(table.get("mixers", {}), dict):
                return table
            mixers = table.get("mixers", {})
            if "position" in table and table.get("layers", ["attention"]) == ["attention"]:
                mixers = {"attention": {"position": table["position"]}} | mixers
            return table | {"mixers": {k: {"kind": k} | v if isinstance(v, dict) else v for k, v in mixers.items()}}


@MODELS.register("hnet")
class HNet:
    class Config(ModelConfig):
        stages: int = Field(2, description="stages")


class Job(Section, identity=False):
    """Where the run lives."""

    dump_folder: str = Field("outputs", description="folder of the run")
    comment: str = Field("", description="free text")
    config_version: int = Field(1, description="version", json_schema_extra=IDENTITY)


class Training(Section):
    """How long and on what."""

    steps: int = Field(gt=0, description="optimizer steps")
    learning_rate: float = Field(3e-4, gt=0, description="peak rate")
    warmup: int | Literal["auto", "none"] = Field("auto", description="steps")
    tokens: int | None = Field(None, description="budget, tokens")
    deterministic: bool = Field(False, description="bitwise the same each time", json_schema_extra=FREE)
    betas: tuple[float, float] = Field((0.9, 0.95), description="momenta", strict=False)

    @model_validator(mode="after")
    def _check(self) -> "Training":
        if self.warmup != "auto" and self.warmup != "none" and self.warmup > self.steps:
            raise ValueError(f"warmup {self.warmup} is longer than steps {self.steps}; lower it")
        return self


class Source(Section):
    path: str = Field(description="URL")
    weight: float = Field(1.0, description="share, a ratio")


class Data(Section):
    sources: ListOf[Source] = Field((), description="what to read")


class SinkConfig(ComponentConfig):
    """A sink."""


SINKS: Registry[Any] = Registry("sink")


@SINKS.register("console")
class Console:
    Config: ClassVar[type[SinkConfig]] = type("Config", (SinkConfig,), {"__module__": __name__})


class Metrics(Section, identity=False):
    class Inner(Section, identity=False):
        width: int = Field(80, description="characters")

    log_freq: int = Field(10, description="steps between rows")
    sinks: ListOf[Annotated[SinkConfig, SINKS]] = Field((), description="where rows go")
    inner: Inner = Field(Inner(), description="the console")


class Experimental(Section):
    custom_import: str | ListOf[str] = Field((), description="modules to import first", json_schema_extra=FREE)


class SmallRun(Section):
    job: Job = Field(Job(), description="the job")
    model: Annotated[ModelConfig, MODELS] = Field(description="the model")
    training: Training = Field(description="the training")
    data: Data = Field(Data(), description="the data")
    metrics: Metrics = Field(Metrics(), description="the metrics")
    experimental: Experimental = Field(Experimental(), description="the experiments")
