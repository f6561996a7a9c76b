"""The decoder: a causal language model of any mixers, channels, norms and position schemes.

Shapes: B rows, T tokens, D model dim, V vocabulary.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from titanarch.config.errors import ConfigError
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.layers import Linear, local
from titanarch.contract.mixer import SequenceMixer, State
from titanarch.contract.model import Model, Objective, model
from titanarch.contract.norm import NORMS
from titanarch.contract.position import ABSOLUTE_POSITIONS
from titanarch.contract.roles import HEAD, Role
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.models.block import Block
from titanarch.models.decoder_config import DecoderConfig
from titanarch.models.dropout import Dropout
from titanarch.models.flavors import FLAVORS
from titanarch.ops.counter_random import uniform_integers
from titanarch.ops.cross_entropy import chunked_cross_entropy, token_cross_entropy

EMBEDDING_SITE = 0
AUGMENTATION_SITE = 1


class Head(Linear):
    """The output matrix [V, D] and its bias; the loss multiplies by it chunk by chunk."""

    roles: dict[str, Role] = {"weight": HEAD}


@model("decoder")
class Decoder(Model):
    """Token embedding (+ absolute position), blocks, final norm (but in post_norm), head."""

    Config = DecoderConfig
    flavors = FLAVORS

    def __init__(self, config: DecoderConfig, vocab_size: int, seq_len: int) -> None:
        super().__init__(config, vocab_size, seq_len)
        self.config = config
        shape = config.shape(vocab_size, seq_len)
        self.shape: ModelShape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.d_model)
        self.position = ABSOLUTE_POSITIONS.of(config.position.absolute)(config.position.absolute, shape)
        self.dropout = Dropout(config.dropout, EMBEDDING_SITE)
        # Activation checkpointing replaces the entries of ``layers`` by wrappers; these stay what they are.
        self.bare_blocks = tuple(
            Block(
                shape,
                layer,
                mixer=config.mixers[name],
                channel=config.channel,
                norm=config.norm,
                residual=config.residual,
                dropout=config.dropout,
            )
            for layer, name in enumerate(shape.layers)
        )
        self.layers = nn.ModuleList(self.bare_blocks)
        self.final_norm = None if config.residual == "post_norm" else NORMS.of(config.norm)(config.norm, shape.d_model)
        if not config.tied_head:
            self.head = Head(shape.d_model, shape.vocab_size, bias=config.head_bias)
        elif config.head_bias:
            self.head_bias_V = nn.Parameter(torch.empty(shape.vocab_size))
        self._check_augmentation(seq_len)

    @staticmethod
    def cost(config: DecoderConfig, vocab_size: int, seq_len: int) -> Cost:
        shape = config.shape(vocab_size, seq_len)
        V, D = shape.vocab_size, shape.d_model
        tables = V * D * (1 if config.tied_head else 2)
        cost = Cost(parameters=tables + V * config.head_bias, embedding_parameters=tables, forward_flops_per_token=2.0 * V * D)
        cost += ABSOLUTE_POSITIONS.of(config.position.absolute).cost(config.position.absolute, shape)
        if config.residual != "post_norm":
            cost += Cost(parameters=NORMS.of(config.norm).n_parameters(config.norm, D))
        for layer, name in enumerate(shape.layers):
            mixer = config.mixers[name]
            cost += Block.cost(shape, layer, mixer=mixer, channel=config.channel, norm=config.norm, residual=config.residual)
        return cost

    def blocks(self) -> Iterator[nn.Module]:
        return iter(self.layers)

    def max_length(self) -> int | None:
        return self.position.max_length()

    def reset_parameters(self, init: Init) -> None:
        """Embedding and head by the scheme, biases of a tied head 0; each component its own."""
        init.embedding(self.embedding)
        self.position.reset_parameters(init)
        for block in self.bare_blocks:
            block.reset_parameters(init)
        if self.final_norm is not None:
            self.final_norm.reset_parameters(init)
        if not self.config.tied_head:
            init.linear(self.head)
        elif self.config.head_bias:
            init.constant(self, "head_bias_V", 0.0)

    def forward(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor, z_weight: float = 0.0) -> Objective:
        x_BTD, carry = self._hidden(tokens_BT, seq)
        x_BTD, labels_BT = self.vocabulary.scored(x_BTD, labels_BT)
        weight_VD, bias_V = self._head()
        loss = chunked_cross_entropy(
            x_BTD.flatten(0, 1),
            weight_VD,
            bias_V,
            labels_BT.flatten(),
            z_weight=z_weight,
            soft_cap=self.config.head_soft_cap,
            shard=self.vocabulary.shard,
        )
        return Objective(loss.total, loss.loss_sum, loss.z_sum, loss.count, carry.aux)

    def token_losses(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor) -> Tensor:
        x_BTD, _ = self._hidden(tokens_BT, seq)
        x_BTD, labels_BT = self.vocabulary.scored(x_BTD, labels_BT)
        weight_VD, bias_V = self._head()
        cap, shard = self.config.head_soft_cap, self.vocabulary.shard
        losses_N = token_cross_entropy(x_BTD.flatten(0, 1), weight_VD, bias_V, labels_BT.flatten(), soft_cap=cap, shard=shard)
        return self.vocabulary.rejoin(losses_N.view_as(labels_BT))

    def logits(self, tokens_BT: Tensor, seq: SequenceInfo) -> Tensor:
        x_BTD, _ = self._hidden(tokens_BT, seq)
        return self.vocabulary.rejoin(self._logits(x_BTD))

    def initial_state(self, n_rows: int) -> list[State]:
        weight = self.embedding.weight
        return [self._decodable(i).initial_state(n_rows, weight.dtype, weight.device) for i in range(self.shape.n_layers)]

    def step(self, tokens_B1: Tensor, index: int, states: list[State]) -> tuple[Tensor, list[State]]:
        whole = SequenceInfo.whole(tokens_B1.shape[0], index + 1, device=tokens_B1.device)
        last = whole.some(lambda x, dim: x.narrow(dim, index, 1))
        x, carry, new_states = self._embed(tokens_B1, last), Carry.empty(), []
        for layer, (block, state) in enumerate(zip(self.bare_blocks, states, strict=True)):
            mixing = MixSequence(query=last, key=whole, site=layer)
            x, carry, state = block.step(x, mixing, carry, state)
            new_states.append(state)
        return self._logits(self._normed(x))[:, 0], new_states

    def _decodable(self, layer: int) -> SequenceMixer:
        mixer = self.bare_blocks[layer].mixer
        if not isinstance(mixer, SequenceMixer):
            raise ConfigError(f"block {layer}: {type(mixer).__qualname__} is no SequenceMixer, so it cannot decode a token at a time")
        return mixer

    def _check_augmentation(self, seq_len: int) -> None:
        longest, available = self.config.position.start_augmentation, self.max_length()
        if longest is not None and longest < seq_len:
            raise ConfigError(
                f"[model.position] start_augmentation ({longest}) is below training.seq_len ({seq_len}); raise it or remove it"
            )
        if available is not None and (longest or seq_len) > available:
            raise ConfigError(
                f"[model.position] positions up to {longest or seq_len} are trained on, but the table has {available}; raise max_length"
            )

    def _embed(self, tokens_BT: Tensor, seq: SequenceInfo) -> Tensor:
        available = self.max_length()
        if available is not None and seq.length > available:
            raise ConfigError(
                f"a sequence of {seq.length} tokens is longer than the position table's {available} rows; shorten it or use another scheme"
            )
        x_BTD = self.vocabulary.embed(tokens_BT, self.embedding.weight)
        if self.config.scale_embedding:
            x_BTD = x_BTD * math.sqrt(self.shape.d_model)
        position_BT, longest = seq.position_BT, self.config.position.start_augmentation
        if longest is not None and seq.seed is not None:
            start_B = uniform_integers(seq.seed, seq.row_B, AUGMENTATION_SITE, longest - seq.length + 1)
            position_BT = position_BT + start_B[:, None]
        out: Tensor = self.dropout(self.position(x_BTD, position_BT), seq)
        return out

    def _hidden(self, tokens_BT: Tensor, seq: SequenceInfo) -> tuple[Tensor, Carry]:
        x_BTD, carry = self._embed(tokens_BT, seq), Carry.empty()
        for block in self.layers:
            x_BTD, carry = block(x_BTD, seq, carry)
        return self._normed(x_BTD), carry

    def _normed(self, x_BTD: Tensor) -> Tensor:
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD)

    def _head(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the rows here."""
        weight_VD, bias_V = self._head_parameters()
        return local(weight_VD), None if bias_V is None else local(bias_V)

    def _head_parameters(self) -> tuple[Tensor, Tensor | None]:
        if not self.config.tied_head:
            return self.head.weight, self.head.bias
        return self.embedding.weight, self.head_bias_V if self.config.head_bias else None

    def _logits(self, x_BTD: Tensor) -> Tensor:
        logits = self.vocabulary.logits(x_BTD, *self._head_parameters())
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cap = self.config.head_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)
