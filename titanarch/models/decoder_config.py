"""[model] of the decoder: one table for every decoder-only model, and its named sizes."""

from typing import Any

from pydantic import Field, field_validator, model_validator

from titanarch.config.errors import did_you_mean
from titanarch.config.section import ListOf
from titanarch.contract.shape import ModelShape
from titanarch.models.flavors import FLAVORS, complete
from titanarch.models.language_config import LanguageModelConfig
from titanarch.models.mixers.softmax import Positive, SoftmaxConfig


class DecoderConfig(LanguageModelConfig):
    """Embedding (+ absolute position), blocks, final norm unless post_norm, head."""

    flavor: str | None = Field(None, description="a named size, whose keys are defaults of this table; unset: all keys are given here")
    n_layers: Positive = Field(description="blocks")
    layers: ListOf[str] = Field(("attention",), description="names of mixers, first block first; the pattern repeats over the depth")

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
        for mixer in self.mixers.values():
            if isinstance(mixer, SoftmaxConfig):
                mixer.check_sizes(self.d_model)
        return self

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, table: Any) -> Any:
        return complete(table) if isinstance(table, dict) else table

    def shape(self, vocab_size: int, seq_len: int) -> ModelShape:
        pattern = self.layers
        layers = tuple(pattern[i % len(pattern)] for i in range(self.n_layers))
        return ModelShape(d_model=self.d_model, vocab_size=self.vocab_size or vocab_size, seq_len=seq_len, layers=layers)
