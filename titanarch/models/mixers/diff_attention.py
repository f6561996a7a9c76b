"""Differential attention: a head is the difference of two attention maps, so that what both see alike cancels.

Version 1 (arXiv:2410.05258), with queries and keys of K channels, values of V = 2 K, and lambda shared by all heads:

    y = (1 - lambda_init) RMSNorm((softmax(q1 k1^T) - lambda softmax(q2 k2^T)) v)
    lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init,        lambda_init = 0.8 - 0.6 exp(-0.3 layer)

Version 2 (microsoft/unilm, Diff-Transformer-V2), two queries on one key and value, and lambda of a token and head:

    y = softmax(q1 k^T) v - sigmoid(x W_lambda) softmax(q2 k^T) v

``n_heads`` counts heads that come out, as both authors' codes do. The two queries of a head lie side by side in a stream, so no
division of heads parts them; both maps leave ``mix`` as heads of their own, each normalized by its own log-sum-exp, and are
subtracted in ``merge``. They share the head's bias by distance and its sink, and drop weights independently.

Shapes: B rows, T queries, S keys, D model dim, H heads, G key/value heads, K channels of a query, V of a value, N distances.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from titanarch.contract.card import Card
from titanarch.contract.cost import Cost, linear_cost
from titanarch.contract.init import Init
from titanarch.contract.layers import HeadParams, Linear
from titanarch.contract.mixer import MixResult, State, Streams, mixer
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import Split
from titanarch.models.mixers.attention import Attention, AttentionConfig
from titanarch.models.mixers.softmax import attend, with_cache

EPS = 1e-5
"""Of the norm a head."""


class DiffAttentionConfig(AttentionConfig):
    """[model.mixers.diff_attention]; a head has the cost of two of attention's, so half as many are as many parameters."""

    maps: ClassVar[int] = 2
    key_maps: ClassVar[int] = 2


@mixer("diff_attention")
class DiffAttention(Attention):
    """The difference of two maps over values twice as wide as a key, normalized a head without a gain.

    Key head g has two keys and one value, and serves H / G heads.
    """

    Config = DiffAttentionConfig
    card = Card(
        "Differential attention: the difference of two softmax maps a head, with a learned weight a layer",
        "arXiv:2410.05258",
        "transformers DiffLlamaAttention",
    )
    tensor_parallel = {**Attention.tensor_parallel, "lambdas": Split.SHARED}
    fp32 = Attention.fp32 | {"lambdas"}
    config: DiffAttentionConfig

    def __init__(self, config: DiffAttentionConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lambdas = HeadParams(dict.fromkeys(("q1_K", "k1_K", "q2_K", "k2_K"), (self.head_dim,)))

    @staticmethod
    def cost(config: AttentionConfig, shape: ModelShape, layer: int) -> Cost:
        return Attention.cost(config, shape, layer) + Cost(parameters=4 * config.channels_per_head(shape.d_model))

    def reset_parameters(self, init: Init) -> None:
        """As attention; the four vectors of lambda N(0, 0.1^2)."""
        super().reset_parameters(init)
        for name, _ in self.lambdas.named_parameters():
            init.normal(self.lambdas, name, 0.1)

    def project(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        """q [B, T, H, 2, K]; k [B, T, G, 2, K]; v [B, T, G, V]."""
        streams, carry = super().project(x_BTD, seq, carry)
        return {"q": streams["q"].unflatten(2, (-1, 2)), "k": streams["k"].unflatten(2, (-1, 2)), "v": streams["v"]}, carry

    @staticmethod
    def mix(
        config: AttentionConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: State | None = None
    ) -> MixResult:
        """Both maps of the local heads, map 1 of a head before its map 2: y [B, T, 2 H, V]."""
        (k, v), state = with_cache(streams, state, ("k", "v"))
        found = []
        for number, (q_BTHK, k_BSGK) in enumerate(zip(streams["q"].unbind(3), k.unbind(3), strict=True)):
            # The second maps' draws are those of heads after the last.
            part = replace(seq, first_head=seq.first_head + number * config.n_heads)
            found.append(attend(config, q_BTHK, k_BSGK, v, head_params, part))
        y = torch.stack([y for y, _ in found], dim=3).flatten(2, 3)
        lses = [lse for _, lse in found if lse is not None]
        return MixResult(y, torch.stack(lses, dim=3).flatten(2, 3) if lses else None, state)

    def merge(self, y_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """Subtract, normalize a head, and what attention does: [B, T, D]. Statistics and lambda in fp32 at least."""
        first, second = y_BTHV.to(torch.promote_types(y_BTHV.dtype, torch.float32)).unflatten(2, (-1, 2)).unbind(3)
        vectors = self.lambdas()
        weight = torch.exp((vectors["q1_K"] * vectors["k1_K"]).sum()) - torch.exp((vectors["q2_K"] * vectors["k2_K"]).sum())
        difference = first - (weight + self.lambda_init) * second
        normed = F.rms_norm(difference, difference.shape[-1:], eps=EPS) * (1 - self.lambda_init)
        return super().merge(normed.to(y_BTHV.dtype), x_BTD)

    def initial_state(self, n_rows: int, dtype: torch.dtype, device: torch.device) -> State:
        """An empty cache: keys [B, 0, G, 2, K], values [B, 0, G, V]."""
        empty = torch.empty(n_rows, 0, self.config.kv_heads(), 2, self.head_dim, dtype=dtype, device=device)
        return {"k": empty, "v": empty.flatten(3)}


class DiffAttentionV2Config(AttentionConfig):
    """[model.mixers.diff_attention_v2]; attention with two queries a head, of the same keys and values."""

    maps: ClassVar[int] = 2


@mixer("diff_attention_v2")
class DiffAttentionV2(Attention):
    """The difference of two maps over the same keys and values, weighed by each token; no norm a head."""

    Config = DiffAttentionV2Config
    card = Card(
        "Differential attention, version 2: twice the queries on unchanged keys and values, a weight a token and head",
        "microsoft/unilm, Diff-Transformer-V2",
        "dense formula",
    )
    tensor_parallel = {**Attention.tensor_parallel, "w_lambda": Split.COLUMN}
    config: DiffAttentionV2Config

    def __init__(self, config: DiffAttentionV2Config, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        self.w_lambda = Linear(shape.d_model, config.n_heads, bias=False)

    @staticmethod
    def cost(config: AttentionConfig, shape: ModelShape, layer: int) -> Cost:
        return Attention.cost(config, shape, layer) + linear_cost(shape.d_model, config.n_heads)

    def reset_parameters(self, init: Init) -> None:
        """As attention; w_lambda by the scheme, so that lambda starts near 1/2."""
        super().reset_parameters(init)
        init.linear(self.w_lambda)

    def project(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        """q [B, T, H, 2, K]; k, v [B, T, G, K]."""
        streams, carry = super().project(x_BTD, seq, carry)
        return {**streams, "q": streams["q"].unflatten(2, (-1, 2))}, carry

    @staticmethod
    def mix(
        config: AttentionConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: State | None = None
    ) -> MixResult:
        """Both maps of the local heads, map 1 of a head before its map 2: y [B, T, 2 H, K]."""
        (k, v), state = with_cache(streams, state, ("k", "v"))
        twice = {name: value.repeat_interleave(2, dim=0) for name, value in head_params.items()}
        y, lse = attend(config, streams["q"].flatten(2, 3), k, v, twice, replace(seq, first_head=2 * seq.first_head))
        return MixResult(y, lse, state)

    def merge(self, y_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """Subtract, and what attention does: [B, T, D]."""
        first, second = y_BTHV.unflatten(2, (-1, 2)).unbind(3)
        return super().merge(first - torch.sigmoid(self.w_lambda(x_BTD))[..., None] * second, x_BTD)
