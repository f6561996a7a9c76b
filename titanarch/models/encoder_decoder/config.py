"""[model] of the encoder-decoder: the keys of every language model, two depths, and the spans."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from titanarch.config.section import ListOf
from titanarch.contract.position import RELATIVE_POSITIONS
from titanarch.contract.shape import ModelShape
from titanarch.models.encoder_decoder.spans import SpansConfig
from titanarch.models.flavors import complete_mixers
from titanarch.models.language_config import LanguageModelConfig
from titanarch.models.mixers.attention import AttentionConfig
from titanarch.models.mixers.softmax import Positive

ENCODER, CROSS = "encoder", "cross"
"""Names in [model.mixers] of what the encoder's blocks and the cross-attention are."""


class EncoderDecoderConfig(LanguageModelConfig):
    """Embedding, encoder, decoder, head. [model.mixers] has the tables ``encoder`` and ``cross`` beside those of ``layers``.

    Both are of kind attention, and take what they do not give from the table ``attention``; ``cross`` takes no positions, window or
    value residual from it.
    """

    own_of_attention: ClassVar[frozenset[str]] = frozenset({"position", "window", "value_residual"})

    n_encoder_layers: Positive = Field(description="blocks of the encoder")
    n_decoder_layers: Positive = Field(description="blocks of the decoder, each with cross-attention")
    layers: ListOf[str] = Field(
        ("attention",),
        description="names of the decoder's causal mixers, first block first; the pattern repeats",
        min_length=1,
    )
    spans: SpansConfig = Field(SpansConfig(), description="the spans that are taken out of rows and restored")
    scale_head: bool = Field(False, description="multiply what the head reads by 1 / sqrt(d_model), as T5 does with its tied head")

    @field_validator("residual")
    @classmethod
    def _wired_in_turn(cls, residual: str) -> str:
        if residual == "parallel":
            raise ValueError("parallel: cross-attention follows the decoder's own; use pre_norm, post_norm, sandwich or no_mixer_residual")
        return residual

    @model_validator(mode="after")
    def _parts_fit(self) -> "EncoderDecoderConfig":
        for name in (ENCODER, CROSS):
            if name in self.layers:
                raise ValueError(f"layers: '{name}' is not causal; name mixers of the decoder")
            if type(self.mixers[name]) is not AttentionConfig:
                raise ValueError(f"mixers.{name}: {self.mixers[name].kind} reads earlier tokens alone; use attention")
        if self.cross.value_residual != "none":
            raise ValueError("mixers.cross: its values are all of one layer, the encoder's last, so it has no value_residual; remove it")
        if self.cross.window is not None:
            raise ValueError("mixers.cross: distances between encoder and decoder mean nothing, so it has no window; remove it")
        biases = [p.kind for p in self.cross.position if RELATIVE_POSITIONS.of(p).has_table]
        if biases:
            raise ValueError(f"mixers.cross: {biases[0]} is a bias by distance, which means nothing between encoder and decoder; remove it")
        for mixer in self.mixers.values():
            mixer.check_sizes(self.d_model)
        for name in self.layers[: self.n_decoder_layers]:
            self.mixers[name].check_first(self.mixers[self.layers[0]], self.d_model)
        return self

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        layers = table.get("layers", ("attention",))
        return complete_mixers(_with_attention(table), layers if isinstance(layers, Sequence) else ())

    @property
    def encoder(self) -> AttentionConfig:
        """Of the encoder's blocks."""
        mixer = self.mixers[ENCODER]
        assert isinstance(mixer, AttentionConfig), "validation checks this"
        return mixer

    @property
    def cross(self) -> AttentionConfig:
        """Of the attention from decoder to encoder."""
        mixer = self.mixers[CROSS]
        assert isinstance(mixer, AttentionConfig), "validation checks this"
        return mixer

    def extra_tokens(self) -> int:
        return self.spans.n_rows

    def shape(self, vocab_size: int, seq_len: int) -> ModelShape:
        """Of rows, as embedding and positions are."""
        return replace(self.decoder_shape(vocab_size, seq_len), seq_len=seq_len)

    def decoder_shape(self, vocab_size: int, seq_len: int) -> ModelShape:
        """The decoder's; its sequences are the targets of a row."""
        layers = tuple(self.layers[i % len(self.layers)] for i in range(self.n_decoder_layers))
        return ModelShape(self.d_model, self.vocab_size or vocab_size, self.spans.counts(seq_len).decoder, layers)

    def encoder_shape(self, vocab_size: int, seq_len: int) -> ModelShape:
        """The encoder's; its sequences are what is left of a row."""
        length = self.spans.counts(seq_len).encoder
        return ModelShape(self.d_model, self.vocab_size or vocab_size, length, (ENCODER,) * self.n_encoder_layers)


def _with_attention(table: dict[str, Any]) -> dict[str, Any]:
    """With tables of encoder and cross-attention; what is malformed is left as it is."""
    mixers = table.get("mixers", {})
    if not isinstance(mixers, dict):
        return table
    shared = mixers.get("attention", {})
    shared = shared if isinstance(shared, Mapping) and shared.get("kind", "attention") == "attention" else {}
    of_cross = {key: value for key, value in shared.items() if key not in EncoderDecoderConfig.own_of_attention} | {"position": []}
    made = {name: _over(mixers.get(name, {}), defaults) for name, defaults in ((ENCODER, shared), (CROSS, of_cross))}
    return {**table, "mixers": {**mixers, **made}}


def _over(own: Any, defaults: Mapping[str, Any]) -> Any:
    own = {"kind": own} if isinstance(own, str) else own
    return {**defaults, "kind": "attention", **own} if isinstance(own, dict) else own
