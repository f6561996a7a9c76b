"""The keys of [model] that language models share."""

from abc import abstractmethod
from typing import Annotated

from pydantic import Field

from titanarch.config.section import Section
from titanarch.contract.channel import CHANNELS, ChannelConfig
from titanarch.contract.init import InitConfig
from titanarch.contract.mixer import MIXERS, MixerConfig
from titanarch.contract.model import ModelConfig
from titanarch.contract.norm import NORMS, NormConfig
from titanarch.contract.position import ABSOLUTE_POSITIONS, AbsolutePositionConfig
from titanarch.contract.shape import ModelShape
from titanarch.models.block import Residual
from titanarch.models.mixers.softmax import Positive, RelativePositions

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


class LanguageModelConfig(ModelConfig):
    """Embedding (+ absolute position), blocks, final norm unless post_norm, head."""

    d_model: Positive = Field(description="width of the residual stream, channels")
    n_heads: Positive = Field(description="query heads of every mixer that has heads, unless its table says otherwise")
    vocab_size: Positive | None = Field(None, description="rows of the embedding; unset: the tokenizer's vocabulary")
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

    @abstractmethod
    def shape(self, vocab_size: int, seq_len: int) -> ModelShape:
        """The shape of the blocks next to embedding and head. ``vocab_size``: the tokenizer's; ``seq_len``: longest sequence, tokens."""
