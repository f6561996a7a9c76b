"""[model] of the decoder: one table for every decoder-only model, and its named sizes."""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from titanarch.config.errors import did_you_mean
from titanarch.config.section import ListOf
from titanarch.contract.channel import CHANNELS, ChannelConfig
from titanarch.contract.shape import ModelShape
from titanarch.models.flavors import FLAVORS, WHOLE, complete
from titanarch.models.language_config import LanguageModelConfig
from titanarch.models.mixers.softmax import Positive


class DecoderConfig(LanguageModelConfig):
    """Embedding (+ absolute position), blocks, final norm unless post_norm, head."""

    flavor: str | None = Field(None, description="a named size, whose keys are defaults of this table; unset: all keys are given here")
    n_layers: Positive = Field(description="blocks")
    layers: ListOf[str] = Field(("attention",), description="names of mixers, first block first; the pattern repeats over the depth")
    channel_layers: ListOf[str] = Field(
        ("channel",),
        description="names of tables in channels, first block first; 'channel' is [model.channel]; the pattern repeats over the depth",
    )
    channels: dict[str, Annotated[ChannelConfig, CHANNELS]] = Field(
        default_factory=dict, description="tables that channel_layers names; the kind of each is its name unless given"
    )

    @field_validator("flavor")
    @classmethod
    def _known_flavor(cls, flavor: str | None) -> str | None:
        if flavor is not None and flavor not in FLAVORS:
            raise ValueError(f"no such flavor{did_you_mean(flavor, FLAVORS)}")
        return flavor

    @model_validator(mode="after")
    def _layers_are_known(self) -> "DecoderConfig":
        if not self.layers:
            raise ValueError("layers is empty; name at least one mixer")
        if not self.channel_layers:
            raise ValueError("channel_layers is empty; name at least one table of channels, or 'channel'")
        if WHOLE in self.channels:
            raise ValueError(f"channels: '{WHOLE}' names [model.channel] in channel_layers; call this table something else")
        for mixer in self.mixers.values():
            mixer.check_sizes(self.d_model)
        for name in self.layers[: self.n_layers]:
            self.mixers[name].check_first(self.mixers[self.layers[0]], self.d_model)
        return self

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, table: Any) -> Any:
        return complete(table) if isinstance(table, dict) else table

    def channel_of(self, layer: int) -> ChannelConfig:
        """The channel mixer's table of a block."""
        name = self.channel_layers[layer % len(self.channel_layers)]
        return self.channel if name == WHOLE else self.channels[name]

    def shape(self, vocab_size: int, seq_len: int) -> ModelShape:
        pattern = self.layers
        layers = tuple(pattern[i % len(pattern)] for i in range(self.n_layers))
        return ModelShape(d_model=self.d_model, vocab_size=self.vocab_size or vocab_size, seq_len=seq_len, layers=layers)
