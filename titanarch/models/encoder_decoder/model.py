"""The encoder-decoder that restores corrupted spans of its rows (T5, arXiv:1910.10683).

It is given rows of tokens as every model is, takes spans out of them (``spans``), and its losses are of the spans' tokens and of the
sentinels before them. The encoder's attention is bidirectional inside a document; a decoder's token sees the targets before it and the
encoder's tokens of its own document.

Shapes: B rows, T tokens, S tokens of the encoder, U targets of the decoder, D model dim, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from titanarch.config.errors import ConfigError, Problem
from titanarch.contract.card import Card
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.mixer import State
from titanarch.contract.model import Objective, Technique, model
from titanarch.contract.norm import NORMS
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.side_channels import Aux, Carry
from titanarch.models.block import Block
from titanarch.models.dropout import Dropout
from titanarch.models.encoder_decoder.attention import MEMORY, MEMORY_DOCUMENT, MEMORY_POSITION
from titanarch.models.encoder_decoder.blocks import DecoderBlock, EncoderBlock
from titanarch.models.encoder_decoder.config import EncoderDecoderConfig
from titanarch.models.encoder_decoder.spans import SPAN_SITE, Corrupted, corrupt, count_targets
from titanarch.models.language_model import LanguageModel
from titanarch.models.mixers.attention import Attention

ENDS_SITE = SPAN_SITE + 1
"""Of the dropout after each stack."""


@model("encoder_decoder")
class EncoderDecoder(LanguageModel):
    """Embedding, encoder and its final norm, decoder, final norm (both but in post_norm), head. One embedding serves both sides."""

    Config = EncoderDecoderConfig
    card = Card("encoder-decoder that restores corrupted spans", "arXiv:1910.10683", "transformers T5ForConditionalGeneration")
    flavors: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    refuses: ClassVar[Mapping[Technique, str]] = {
        "context_parallel": "its targets stand elsewhere than in the row, and cross-attention reads every token of a document",
        "sequence_parallel": "encoder and decoder have other numbers of tokens than the row, which need not divide",
        "float8": "encoder and decoder have other numbers of tokens than the row, which need be no multiples of 16",
        "scoring_windows": "the model restores spans from both sides, so no loss of it is of a token by those before it",
    }
    config: EncoderDecoderConfig

    def build_body(self) -> None:
        config, n_rows, row_length = self.config, self.shape.vocab_size, self.shape.seq_len
        if config.spans.longest_row() < row_length:
            n_spans = config.spans.counts(row_length).n_spans
            message = f"{config.spans.n_sentinels} are fewer than the {n_spans} spans of a row of {row_length} tokens; raise it"
            raise ConfigError(Problem(message, "model.spans.n_sentinels"))
        encoder_shape, decoder_shape = config.encoder_shape(n_rows, row_length), config.decoder_shape(n_rows, row_length)
        channel, norm, residual, dropout = config.channel, config.norm, config.residual, config.dropout
        self.bare_encoder = tuple(
            EncoderBlock(encoder_shape, layer, mixer=config.encoder, channel=channel, norm=norm, residual=residual, dropout=dropout)
            for layer in range(encoder_shape.n_layers)
        )
        self.bare_decoder = tuple(
            DecoderBlock(
                decoder_shape,
                layer,
                mixer=config.mixers[name],
                cross=config.cross,
                channel=channel,
                norm=norm,
                residual=residual,
                dropout=dropout,
            )
            for layer, name in enumerate(decoder_shape.layers)
        )
        self.encoder, self.decoder = nn.ModuleList(self.bare_encoder), nn.ModuleList(self.bare_decoder)
        self.encoder_norm = None if residual == "post_norm" else NORMS.of(norm)(norm, self.shape.d_model)
        self.ends_dropout = Dropout(dropout, ENDS_SITE)
        self.head_scale = self.shape.d_model**-0.5

    @staticmethod
    def cost(config: EncoderDecoderConfig, vocab_size: int, seq_len: int) -> Cost:
        """FLOPs are of a row's encoder tokens and targets, divided by the row's tokens. There is no state: it does not decode."""
        shape, encoder_shape = config.decoder_shape(vocab_size, seq_len), config.encoder_shape(vocab_size, seq_len)
        channel, norm, residual = config.channel, config.norm, config.residual
        of_target, of_read = LanguageModel.ends_cost(config, config.shape(vocab_size, seq_len)), Cost()
        if residual != "post_norm":
            of_read += Cost(parameters=NORMS.of(norm).n_parameters(norm, shape.d_model))
        for layer in range(encoder_shape.n_layers):
            of_read += EncoderBlock.cost(encoder_shape, layer, mixer=config.encoder, channel=channel, norm=norm, residual=residual)
        for layer, name in enumerate(shape.layers):
            of_query, of_key = DecoderBlock.cross_costs(shape, encoder_shape.seq_len, cross=config.cross, norm=norm, residual=residual)
            of_target += DecoderBlock.cost(shape, layer, mixer=config.mixers[name], channel=channel, norm=norm, residual=residual)
            of_target, of_read = of_target + of_query, of_read + of_key
        flops = of_target.forward_flops_per_token * shape.seq_len + of_read.forward_flops_per_token * encoder_shape.seq_len
        return replace(of_target + of_read, forward_flops_per_token=flops / seq_len, state_bytes=0)

    def blocks(self) -> Iterator[nn.Module]:
        yield from self.encoder
        yield from self.decoder

    def max_length(self) -> int | None:
        """Of a row: it has a sentinel for each span, and no position beyond the table's."""
        positions, spans = super().max_length(), self.config.spans.longest_row()
        return spans if positions is None else min(positions, spans)

    def grow_from(self, base: Any) -> None:
        super().grow_from(base)
        self.head_scale = base.head_scale

    def reset_parameters(self, init: Init) -> None:
        """As every language model; the encoder's final norm its own."""
        super().reset_parameters(init)
        if self.encoder_norm is not None:
            self.encoder_norm.reset_parameters(init)

    def reset_body(self, init: Init) -> None:
        """Each block its own, a decoder's block as one and a half: it adds three times to its stream. With the scheme ``fan_in``,
        queries are drawn so that logits start with unit variance under the mixer's ``scale``: T5's N(0, 1 / (d p)) for scale 1.
        """
        stacks: tuple[tuple[tuple[Block, ...], int], ...] = (
            (self.bare_encoder, len(self.bare_encoder)),
            (self.bare_decoder, (3 * len(self.bare_decoder) + 1) // 2),
        )
        for blocks, depth in stacks:
            for block in blocks:
                block.reset_parameters(init.with_depth(depth))
                for mixer in block.modules():
                    if init.config.scheme == "fan_in" and isinstance(mixer, Attention) and mixer.config.scale is not None:
                        std = init.width_factor(mixer.wq, "weight") / (mixer.config.scale * math.sqrt(self.shape.d_model * mixer.head_dim))
                        init.normal(mixer.wq, "weight", std)

    def forward(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor, z_weight: float = 0.0) -> Objective:
        """Its targets are the spans of the rows and their sentinels, where ``labels_BT`` scores the tokens."""
        found = self._corrupted(tokens_BT, seq, labels_BT)
        x_BUD, carry = self._restored(found)
        objective = self._objective(x_BUD, carry, found.labels_BU, z_weight)
        n_noise = self.config.spans.counts(seq.length).n_noise * len(tokens_BT)
        cut = Aux(found.n_cut.float(), torch.full_like(found.n_cut, n_noise, dtype=torch.float32), 0.0)
        return objective._replace(aux={**objective.aux, "cut_targets": cut})

    def token_losses(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor) -> Tensor:
        """Nats [B, T] at the corrupted tokens, 0 elsewhere; the first of a span has its sentinel's too."""
        found = self._corrupted(tokens_BT, seq, labels_BT)
        losses_BU = self._losses(self._restored(found)[0], found.labels_BU)
        return losses_BU.new_zeros(tokens_BT.shape).scatter_add(1, found.place_BU, losses_BU)

    def logits(self, tokens_BT: Tensor, seq: SequenceInfo) -> Tensor:
        """Of the targets of the rows, sentinels and corrupted tokens, fp32 [B, U, V]."""
        x_BUD, _ = self._restored(self._corrupted(tokens_BT, seq, tokens_BT))
        return self.vocabulary.rejoin(self._logits(x_BUD))

    def count_targets(self, labels_BT: Tensor, seq: SequenceInfo) -> int:
        return count_targets(labels_BT, seq, self.config.spans)

    def initial_state(self, n_rows: int) -> list[State]:
        raise ConfigError(
            "EncoderDecoder restores spans of whole rows, so it cannot decode a token at a time; use another model to generate"
        )

    def step(self, tokens_B1: Tensor, index: int, states: list[State]) -> tuple[Tensor, list[State]]:
        self.initial_state(len(tokens_B1))
        raise AssertionError("initial_state always raises")

    def _corrupted(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor) -> Corrupted:
        longest = self.max_length()
        if longest is not None and seq.length > longest:
            raise ConfigError(f"a row of {seq.length} tokens is longer than the {longest} that the model has sentinels and positions for")
        return corrupt(tokens_BT, labels_BT, seq, self.config.spans, self.shape.vocab_size)

    def _encoded(self, tokens_BS: Tensor, seq: SequenceInfo) -> tuple[Tensor, Carry]:
        """What cross-attention reads, [B, S, D]."""
        x_BSD, carry = self._embed(tokens_BS, seq), Carry.empty()
        for block in self.encoder:
            x_BSD, carry = block(x_BSD, seq, carry)
        x_BSD = x_BSD if self.encoder_norm is None else self.encoder_norm(x_BSD)
        return self.ends_dropout(x_BSD, seq), carry

    def _restored(self, found: Corrupted) -> tuple[Tensor, Carry]:
        """What the head reads, [B, U, D]."""
        memory_BSD, carry = self._encoded(found.tokens_BS, found.encoder)
        x_BUD, carry = self._embed(found.inputs_BU, found.decoder), Carry(self._memory(memory_BSD, found.encoder), carry.aux)
        for block in self.decoder:
            x_BUD, carry = block(x_BUD, found.decoder, carry)
        x_BUD = self.ends_dropout(self._normed(x_BUD), found.decoder)
        return x_BUD * self.head_scale if self.config.scale_head else x_BUD, carry

    @staticmethod
    def _memory(memory_BSD: Tensor, seq: SequenceInfo) -> dict[str, Tensor]:
        """What the decoder's blocks find of the encoder in their carry."""
        return {MEMORY: memory_BSD, MEMORY_DOCUMENT: seq.document_BT, MEMORY_POSITION: seq.position_BT}
