"""[model] of the energy-based transformer."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from titanarch.config.errors import did_you_mean
from titanarch.contract.channel import CHANNELS, ChannelConfig
from titanarch.contract.init import InitConfig
from titanarch.contract.mixer import MIXERS, MixerConfig
from titanarch.contract.model import ModelConfig
from titanarch.contract.norm import NORMS, NormConfig
from titanarch.contract.position import RELATIVE_POSITIONS
from titanarch.contract.shape import ModelShape
from titanarch.models.flavors import FLAVORS, with_defaults
from titanarch.models.mixers.attention import AttentionConfig
from titanarch.models.norms import LayerNormConfig

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
GradientBy = Literal["distribution", "logits"]

SIZES: Mapping[str, Mapping[str, Any]] = {
    name: table for name, table in FLAVORS.items() if table.keys() <= {"n_layers", "d_model", "n_heads", "channel"}
}
"""The named sizes of the decoder that say nothing beside sizes."""


class EBTConfig(ModelConfig):
    """An energy of (context, predicted distribution), and how predictions descend it.

    S1 is the paper's setting for pretraining, and the defaults here; S2, its setting for thinking longer, has ``step_size`` 5,
    ``detach`` false, ``loss`` "last", ``random_step_scale`` 2, ``random_steps`` and ``langevin_noise`` above 0.
    """

    flavor: str | None = Field(None, description="a named size, whose keys are defaults of this table; unset: all keys are given here")
    n_layers: Positive = Field(description="blocks")
    d_model: Positive = Field(description="width of the residual stream, channels")
    n_heads: Positive = Field(description="query heads, unless the mixer's table says otherwise")
    vocab_size: Positive | None = Field(None, description="rows of the embedding; unset: the tokenizer's vocabulary")
    mixer: Annotated[MixerConfig, MIXERS] = Field(
        description="attention of every block; it rotates (rotary) unless its table says otherwise"
    )
    channel: Annotated[ChannelConfig, CHANNELS] = Field(
        description="what each block applies to every token; it must have second derivatives"
    )
    norm: Annotated[NormConfig, NORMS] = Field(default_factory=lambda: NORMS.resolve("rmsnorm"), description="all norms over the stream")
    prediction_embedding: Literal["linear", "tied"] = Field(
        "linear", description="how a predicted distribution becomes a vector: linear, a matrix of its own; tied, the token embedding's"
    )
    step_embedding: bool = Field(
        True, description="a learned vector for each of n_steps that every token attends to; contexts are then read anew for each"
    )
    n_steps: Positive = Field(2, description="refinement steps, each down the gradient of an energy")
    random_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="in training each row takes up to this many steps more, evenly drawn; all are computed, and evaluation takes all"
    )
    eval_steps: Positive | None = Field(
        None, description="refinement steps of evaluation, beyond training's to think longer; unset: n_steps + random_steps"
    )
    step_size: Annotated[float, Field(gt=0)] = Field(500.0, description="factor of the energy's gradient; the start where it is learned")
    learn_step_size: bool = Field(True, description="whether step_size is a parameter, in the learning-rate group step_size")
    random_step_scale: Annotated[float, Field(ge=1)] = Field(
        1.0, description="in training step_size is drawn a token and step between itself / this and itself * this; 1: as it is"
    )
    langevin_noise: NonNegative = Field(
        0.0, description="in training, standard deviation of the noise added to predictions before each step"
    )
    start: Literal["noise", "zeros"] = Field(
        "noise", description="the first prediction, logits: N(0, 1) noise, or zeros (all tokens alike)"
    )
    gradient_by: GradientBy = Field(
        "distribution",
        description="what the energy is differentiated by and the step starts from; distribution: softmax(p), after which the result is "
        "read as logits, as the authors' code does; logits: p",
    )
    detach: bool = Field(True, description="no gradient passes from a step to the one before")
    loss: Literal["mean", "last"] = Field("mean", description="cross-entropy of all steps' predictions, averaged; or of the last one alone")
    replay_buffer: bool = Field(False, description="start some rows from their predictions of earlier steps; not built, so only false")
    init: InitConfig = Field(InitConfig(), description="initial weights")

    @field_validator("flavor")
    @classmethod
    def _known_flavor(cls, flavor: str | None) -> str | None:
        if flavor is not None and flavor not in SIZES:
            raise ValueError(f"no such flavor{did_you_mean(flavor, SIZES)}")
        return flavor

    @field_validator("replay_buffer")
    @classmethod
    def _no_replay(cls, replay_buffer: bool) -> bool:
        if replay_buffer:
            raise ValueError(
                "a replay buffer makes a step depend on what each process saw before, so a run would change with its layout and its "
                "restarts; it is not built: remove the key"
            )
        return replay_buffer

    @field_validator("channel")
    @classmethod
    def _channel_is_smooth(cls, channel: ChannelConfig) -> ChannelConfig:
        if not CHANNELS.of(channel).second_derivatives:
            able = ", ".join(name for name in CHANNELS if CHANNELS[name].second_derivatives)
            raise ValueError(f"'{channel.kind}' looks at other tokens or has no second derivative; use one of: {able}")
        return channel

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        flavor = table.get("flavor")
        if isinstance(flavor, str) and flavor in SIZES:
            table = with_defaults(table, SIZES[flavor])
        mixer = table.get("mixer", "attention")
        mixer = {"kind": mixer} if isinstance(mixer, str) else mixer
        if not isinstance(mixer, dict) or mixer.get("kind", "attention") != "attention":
            return table
        inherited = {"n_heads": table["n_heads"]} if "n_heads" in table else {}
        return {**table, "mixer": {"kind": "attention", "position": "rotary", **inherited, **mixer}}

    @model_validator(mode="after")
    def _mixer_fits(self) -> "EBTConfig":
        mixer = self.mixer
        if not isinstance(mixer, AttentionConfig):
            raise ValueError(f"mixer '{mixer.kind}' cannot read a prediction beside its context; use attention")
        mixer.channels_per_head(self.d_model)
        refused = {
            "window": mixer.window is not None,
            "soft_cap": mixer.soft_cap is not None,
            "sinks": mixer.sinks,
            "value_residual": mixer.value_residual != "none",
            "dropout": mixer.dropout != 0,
        }
        for key in (key for key, is_set in refused.items() if is_set):
            raise ValueError(f"mixer.{key} has no meaning here for a prediction beside its context; remove it")
        for position in mixer.position:
            if RELATIVE_POSITIONS.of(position).has_table:
                raise ValueError(f"mixer.position '{position.kind}' is a bias by distance, which has no second derivative here; use rotary")
        return self

    @property
    def most_steps(self) -> int:
        """Steps that a forward of training computes."""
        return self.n_steps + self.random_steps

    @property
    def final_norm(self) -> NormConfig:
        """The norm before the energy: without a bias, which would add the same to every energy and never have a gradient."""
        return self.norm.model_copy(update={"bias": False}) if isinstance(self.norm, LayerNormConfig) else self.norm

    @property
    def attention(self) -> AttentionConfig:
        assert isinstance(self.mixer, AttentionConfig), "validation checks this"
        return self.mixer

    def shape(self, vocab_size: int, seq_len: int) -> ModelShape:
        layers = ("attention",) * self.n_layers
        return ModelShape(d_model=self.d_model, vocab_size=self.vocab_size or vocab_size, seq_len=seq_len, layers=layers)
