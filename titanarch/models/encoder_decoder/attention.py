"""Attention of an encoder-decoder: both ways within documents, and across from the decoder to the encoder.

Neither is causal, so they are no registered mixers: this spec alone places them.

Shapes: B rows, S tokens of the encoder, U tokens of the decoder, X = U + S, D model dim, H query heads, G key heads, K head dim.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from titanarch.contract.cost import Cost, linear_cost, mean_visible_keys
from titanarch.contract.mixer import MixResult, State, Streams
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.models.mixers.attention import Attention, AttentionConfig
from titanarch.models.mixers.softmax import attend

MEMORY, MEMORY_DOCUMENT, MEMORY_POSITION = "encoder.memory", "encoder.document", "encoder.position"
"""Names in the decoder's carry: what the encoder made of its tokens, [B, S, D]; their documents and positions, [B, S]."""


def attend_both_ways(config: AttentionConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> MixResult:
    """Every query sees all keys of its document."""
    y, lse = attend(config, streams["q"], streams["k"], streams["v"], head_params, seq, causal=False)
    return MixResult(y, lse)


class BidirectionalAttention(Attention):
    """softmax(q k^T scale + bias) v over the tokens of the same document, on both sides."""

    both_ways = True

    @staticmethod
    def cost(config: AttentionConfig, shape: ModelShape, layer: int) -> Cost:
        """Of a token of the encoder: it sees as many keys after it as before it, and itself."""
        later_keys = mean_visible_keys(shape.seq_len, config.window) - 1
        channels = config.channels_per_head(shape.d_model)
        return Attention.cost(config, shape, layer) + Cost(forward_flops_per_token=4.0 * config.n_heads * channels * later_keys)

    @staticmethod
    def mix(
        config: AttentionConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: State | None = None
    ) -> MixResult:
        assert state is None, "an encoder does not decode"
        return attend_both_ways(config, streams, head_params, seq)


class CrossAttention(Attention):
    """Queries of the decoder's tokens, keys and values of the encoder's tokens of the same document.

    Its input is both, one after the other, [B, X, D]: so tensor parallelism, which sums the gradient of a mixer's first argument,
    sums that of the encoder's tokens too. Its output is of the decoder's tokens.
    """

    def __init__(self, config: AttentionConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        self.site = shape.n_layers + layer

    @staticmethod
    def costs(config: AttentionConfig, d_model: int, n_keys: int) -> tuple[Cost, Cost]:
        """Of a token of the decoder, with all parameters, and of a token of the encoder, whose keys and values it makes."""
        shape = ModelShape(d_model, 1, n_keys, ("cross",))
        whole = Attention.cost(config, shape, 0)
        of_key = linear_cost(d_model, 2 * config.kv_heads() * config.channels_per_head(d_model)).forward_flops_per_token
        pairs = 4.0 * config.n_heads * config.channels_per_head(d_model) * (n_keys - mean_visible_keys(n_keys))
        return replace(whole, forward_flops_per_token=whole.forward_flops_per_token - of_key + pairs), Cost(forward_flops_per_token=of_key)

    def run(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Tensor, Carry]:
        memory_BSD = carry.values[MEMORY]
        return super().run(torch.cat([x_BTD, memory_BSD.to(x_BTD.dtype)], dim=1), seq, carry)

    def forward(self, x_BXD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Tensor, Carry]:
        """merge(mix(project(x))), [B, U, D]; the keys are other tokens than the queries."""
        streams, carry = self.project(x_BXD, seq, carry)
        head_params, carry = self.head_params(seq, carry)
        document_BS, position_BS = carry.values[MEMORY_DOCUMENT], carry.values[MEMORY_POSITION]
        index_S = torch.arange(document_BS.shape[1], device=document_BS.device)
        key = replace(seq, position_BT=position_BS, document_BT=document_BS, index_T=index_S, length=len(index_S))
        result = self.mix_step(self, streams, head_params, MixSequence(query=seq, key=key, site=self.site))
        return self.merge(result.y_BTHV, x_BXD[:, : seq.length]), carry

    def project(self, x_BXD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        """q [B, U, H, K]; k, v [B, S, G, K]."""
        K = self.head_dim
        x_BUD, memory_BSD = x_BXD[:, : seq.length], x_BXD[:, seq.length :]
        q = self.wq(x_BUD).unflatten(-1, (-1, K))
        k, v = (linear(memory_BSD).unflatten(-1, (-1, K)) for linear in (self.wk, self.wv))
        q, k = self.normed(q, k)
        for position in self.relative_positions():
            q, _ = position.rotate(q, q, seq.position_BT)
            _, k = position.rotate(k, k, carry.values[MEMORY_POSITION])
        return {"q": q, "k": k, "v": v}, carry

    @staticmethod
    def mix(
        config: AttentionConfig, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: State | None = None
    ) -> MixResult:
        assert state is None, "a restorer of whole rows does not decode"
        return attend_both_ways(config, streams, head_params, seq)
