"""Attention whose values go through a feed-forward layer before they are mixed: march's experiments without channel mixers.

As in march's published models (``march/models/values_relu.py``), the layer reads the values of all heads together, and the block has no
other feed-forward layer: give [model.channel] the kind none. Its experiments: ValuesRelu is ``form = "up_down"`` with four times as many
hidden units, ValuesReluNoUpProj the same with as many as channels, ValuesReluFirstFF ``form = "first"``.

Shapes: B rows, T tokens, D model dim, G key/value heads, K head dim, U hidden units.
"""

from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from titanarch.contract.card import Card
from titanarch.contract.cost import Cost, linear_cost
from titanarch.contract.init import Init
from titanarch.contract.layers import Linear
from titanarch.contract.mixer import mixer
from titanarch.contract.shape import ModelShape
from titanarch.contract.split import Split
from titanarch.models.mixers.attention import Attention, AttentionConfig


class ValuesReluConfig(AttentionConfig):
    """[model.mixers.values_relu_attention]: the keys of attention, and the layer of its values."""

    kind: ClassVar[str] = ""

    form: Literal["up_down", "first"] = Field(
        "up_down", description="up_down: v = down(relu(up(x W_v))); first: v = projection(relu(x W_v)), a square one"
    )
    value_units: Annotated[int, Field(gt=0)] | None = Field(None, description="hidden units of up_down; unset: 4 * d_model")

    @model_validator(mode="after")
    def _units_of_up_down(self) -> "ValuesReluConfig":
        if self.form == "first" and self.value_units is not None:
            raise ValueError(f"value_units ({self.value_units}) does nothing with form = 'first', whose projection is square; remove it")
        return self

    def units(self, d_model: int) -> int:
        """What the last projection of the values reads."""
        width = self.kv_heads() * self.channels_per_head(d_model)
        return width if self.form == "first" else self.value_units or 4 * d_model


@mixer("values_relu_attention")
class ValuesReluAttention(Attention):
    """Attention with v = wv(relu(value_up(value_in(x)))), or wv(relu(value_in(x))).

    Tensor parallelism divides ``wv``, the last projection, by head; what precedes it reads all heads and is computed on every process.
    """

    Config = ValuesReluConfig
    card = Card("attention with a feed-forward layer on its values", "march (research notes)", "closed form")
    tensor_parallel = {**Attention.tensor_parallel, "value_in": Split.SHARED, "value_up": Split.SHARED}
    float8 = Attention.float8 | {"value_in", "value_up"}
    config: ValuesReluConfig

    def __init__(self, config: ValuesReluConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        D, width, n_units = shape.d_model, self.wv.out_features, config.units(shape.d_model)
        self.value_in = Linear(D, width, bias=config.qkv_bias)
        if config.form == "up_down":
            self.value_up = Linear(width, n_units, bias=False)
        self.wv = Linear(n_units, width, bias=False)

    @staticmethod
    def cost(config: Any, shape: ModelShape, layer: int) -> Cost:
        width, n_units = config.kv_heads() * config.channels_per_head(shape.d_model), config.units(shape.d_model)
        cost = Attention.cost(config, shape, layer) + linear_cost(n_units, width)
        return cost + linear_cost(width, n_units) if config.form == "up_down" else cost

    def reset_parameters(self, init: Init) -> None:
        """As attention; the layer of the values as linears of the scheme."""
        super().reset_parameters(init)
        init.linear(self.value_in)
        if self.config.form == "up_down":
            init.linear(self.value_up)

    def values(self, x_BTD: Tensor) -> Tensor:
        """[B, T, G K] of the local heads."""
        v_BTU = self.value_in(x_BTD)
        if self.config.form == "up_down":
            v_BTU = self.value_up(v_BTU)
        out: Tensor = self.wv(F.relu(v_BTU))
        return out
