"""[model] of H-Net: the keys of every language model, the stages around, and the stack inside."""

from itertools import pairwise
from typing import Annotated, Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from titanarch.config.section import ListOf, Section
from titanarch.contract.channel import CHANNELS, ChannelConfig
from titanarch.contract.shape import ModelShape
from titanarch.models.flavors import complete_mixers
from titanarch.models.hnet.chunks import n_slots
from titanarch.models.language_config import LanguageModelConfig
from titanarch.models.mixers.softmax import Positive

Channel = Annotated[ChannelConfig, CHANNELS]


class StackConfig(Section):
    """Blocks one after the other."""

    layers: ListOf[str] = Field(description="names of mixers, first block first; the pattern repeats over the depth", min_length=1)
    n_layers: Positive | None = Field(None, description="blocks; unset: as many as layers names")

    def names(self) -> tuple[str, ...]:
        """Each block's mixer."""
        return tuple(self.layers[i % len(self.layers)] for i in range(self.n_layers or len(self.layers)))


class StageConfig(Section):
    """[[model.stages]]: blocks before and after everything that is inside the stage; the outermost stage comes first."""

    encoder: StackConfig = Field(description="blocks that read tokens, before they are chunked")
    decoder: StackConfig = Field(description="blocks that read tokens and the chunks' averages")
    d_model: Positive | None = Field(None, description="width, channels; unset: that of the stage outside, model.d_model for the first")
    channel: Channel | None = Field(None, description="what its blocks apply to every token; unset: model.channel")
    ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] = Field(6.0, description="target of the ratio loss, tokens a chunk")
    capacity: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="slots for chunks as a share of its tokens, rounded up to 16; a boundary beyond them is none; 1: there are none"
    )


class MainConfig(StackConfig):
    """[model.main]: the innermost stack."""

    d_model: Positive | None = Field(None, description="width, channels; unset: that of the last stage")
    channel: Channel | None = Field(None, description="what its blocks apply to every chunk; unset: model.channel")


class Level(NamedTuple):
    """A stage, or the main stack: ``shape.layers`` are its encoder's and then its decoder's. ``share``: tokens it sees of a row's."""

    shape: ModelShape
    n_encoder: int
    channel: ChannelConfig
    share: float


class HNetConfig(LanguageModelConfig):
    """Embedding, stages, main stack, head. d_model is the width of the first stage, of embedding and head."""

    stages: ListOf[StageConfig] = Field(description="the outermost first", min_length=1)
    main: MainConfig = Field(description="the innermost stack")
    ratio_loss_weight: Annotated[float, Field(ge=0)] = Field(0.03, description="factor of each stage's ratio loss in the objective")
    embedding_std: Annotated[float, Field(gt=0)] = Field(1.0, description="standard deviation of the initial token embedding")
    lr_groups: bool = Field(
        False,
        description="stage i and the main stack are learning-rate groups, stage_i and main in optimizer.lr_multipliers",
    )

    @field_validator("stages")
    @classmethod
    def _first_width_is_the_models(cls, stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        if stages[0].d_model is not None:
            raise ValueError("stages[0].d_model: the first stage is as wide as the embedding; give model.d_model instead")
        return stages

    @model_validator(mode="after")
    def _sizes_fit(self) -> "HNetConfig":
        levels = self.levels(1, 1)
        for outer, inner in pairwise(levels):
            if inner.shape.d_model < outer.shape.d_model:
                raise ValueError(f"width {inner.shape.d_model} inside {outer.shape.d_model}: widths may only grow inward")
        for level in levels:
            for name in level.shape.layers:
                self.mixers[name].check_sizes(level.shape.d_model)
                self.mixers[name].check_first(self.mixers[level.shape.layers[0]], level.shape.d_model)
        return self

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, table: Any) -> Any:
        return complete_mixers(table, _named_mixers(table)) if isinstance(table, dict) else table

    def shape(self, vocab_size: int, seq_len: int) -> ModelShape:
        return self.levels(vocab_size, seq_len)[0].shape

    def levels(self, vocab_size: int, seq_len: int, *, expected: bool = False) -> list[Level]:
        """The stages, outermost first, and the main stack.

        Their sequences are as long as the slots are many; ``expected``: as the targets of the ratio losses make them.
        """
        levels, width, length, share = [], self.d_model, seq_len, 1.0
        for stage in self.stages:
            encoder, decoder = stage.encoder.names(), stage.decoder.names()
            width = stage.d_model or width
            shape = ModelShape(width, self.vocab_size or vocab_size, length, encoder + decoder)
            levels.append(Level(shape, len(encoder), stage.channel or self.channel, share))
            share /= stage.ratio
            length = max(1, round(seq_len * share)) if expected else n_slots(length, stage.capacity)
        names = self.main.names()
        shape = ModelShape(self.main.d_model or width, self.vocab_size or vocab_size, length, names)
        return [*levels, Level(shape, len(names), self.main.channel or self.channel, share)]


def _named_mixers(table: dict[str, Any]) -> list[str]:
    """Names of mixers in the stacks of a table that is not validated yet; what is malformed names none."""
    stages = table.get("stages", ())
    stacks = [table.get("main")]
    for stage in stages if isinstance(stages, list | tuple) else ():
        stacks += [stage.get("encoder"), stage.get("decoder")] if isinstance(stage, dict) else []
    layers = [stack.get("layers", ()) for stack in stacks if isinstance(stack, dict)]
    return [name for names in layers if isinstance(names, list | tuple) for name in names if isinstance(name, str)]
