"""[model] of the decoder: one table for every decoder-only model, and its named sizes."""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from titanarch.config.errors import did_you_mean
from titanarch.config.section import ListOf, Section
from titanarch.contract.channel import CHANNELS, ChannelConfig
from titanarch.contract.init import InitConfig
from titanarch.contract.mixer import MIXERS, MixerConfig
from titanarch.contract.model import ModelConfig
from titanarch.contract.norm import NORMS, NormConfig
from titanarch.contract.position import ABSOLUTE_POSITIONS, AbsolutePositionConfig
from titanarch.contract.shape import ModelShape
from titanarch.models.block import Residual
from titanarch.models.flavors import FLAVORS, complete
from titanarch.models.mixers.attention import AttentionConfig, Positive, RelativePositions

Probability = Annotated[float, Field(ge=0, lt=1)]


class PositionConfig(Section):
    """[model.position]: where tokens are."""

    absolute: Annotated[AbsolutePositionConfig, ABSOLUTE_POSITIONS] = Field(
        default_factory=lambda: ABSOLUTE_POSITIONS.resolve("none"), description="changes the token embeddings by position"
    )
    relative: RelativePositions = Field((), description="default of every attention layer: rotations and biases by distance")
    start_augmentation: Positive | None = Field(
        None, description="in training, add U{0 .. this - seq_len} to all positions of a row, tokens; unset: positions start at 0"
    )


class DecoderConfig(ModelConfig):
    """Embedding (+ absolute position), blocks, final norm unless post_norm, head."""

    flavor: str | None = Field(None, description="a named size, whose keys are defaults of this table; unset: all keys are given here")
    n_layers: Positive = Field(description="blocks")
    d_model: Positive = Field(description="width of the residual stream, channels")
    n_heads: Positive = Field(description="query heads of every mixer that has heads, unless its table says otherwise")
    vocab_size: Positive | None = Field(None, description="rows of the embedding; unset: the tokenizer's vocabulary")
    layers: ListOf[str] = Field(("attention",), description="names of mixers, first block first; the pattern repeats over the depth")
    mixers: dict[str, Annotated[MixerConfig, MIXERS]] = Field(description="each mixer's table; its kind is its name unless given")
    position: PositionConfig = Field(default_factory=PositionConfig, description="position schemes")
    channel: Annotated[ChannelConfig, CHANNELS] = Field(description="what each block applies to every token")
    norm: Annotated[NormConfig, NORMS] = Field(default_factory=lambda: NORMS.resolve("rmsnorm"), description="all norms over the stream")
    residual: Residual = Field("pre_norm", description="how a block is wired: pre_norm, post_norm, sandwich, parallel, no_mixer_residual")
    dropout: Probability = Field(0.0, description="probability on embeddings and on what each mixer adds to the residual stream")
    tied_head: bool = Field(False, description="the head's matrix is the token embedding")
    head_bias: bool = Field(False, description="a bias on the logits")
    head_soft_cap: Annotated[float, Field(gt=0)] | None = Field(None, description="logits become cap * tanh(logits / cap); unset: no cap")
    scale_embedding: bool = Field(False, description="multiply token embeddings by sqrt(d_model)")
    init: InitConfig = Field(InitConfig(), description="initial weights")

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
            if isinstance(mixer, AttentionConfig):
                mixer.channels_per_head(self.d_model)
        return self

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, table: Any) -> Any:
        return complete(table) if isinstance(table, dict) else table

    def shape(self, vocab_size: int, seq_len: int) -> ModelShape:
        pattern = self.layers
        layers = tuple(pattern[i % len(pattern)] for i in range(self.n_layers))
        return ModelShape(d_model=self.d_model, vocab_size=self.vocab_size or vocab_size, seq_len=seq_len, layers=layers)
