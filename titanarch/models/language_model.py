"""What language models share: embedding, final norm, head and loss, around a body of blocks.

Shapes: B rows, T tokens, D model dim, V vocabulary.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from titanarch.config.errors import ConfigError
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.layers import Linear, local
from titanarch.contract.mixer import SequenceMixer, State
from titanarch.contract.model import Model, Objective
from titanarch.contract.norm import NORMS
from titanarch.contract.position import ABSOLUTE_POSITIONS
from titanarch.contract.roles import HEAD, Role
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Aux, Carry
from titanarch.models.block import Block
from titanarch.models.dropout import Dropout
from titanarch.models.language_config import LanguageModelConfig
from titanarch.ops.counter_random import uniform_integers
from titanarch.ops.cross_entropy import chunked_cross_entropy, token_cross_entropy

EMBEDDING_SITE = 0
AUGMENTATION_SITE = 1


class Head(Linear):
    """The output matrix [V, D] and its bias; the loss multiplies by it chunk by chunk."""

    roles: dict[str, Role] = {"weight": HEAD}


class LanguageModel(Model):
    """Token embedding (+ absolute position), a body, final norm (but in post_norm), head. Subclasses write body and predictions."""

    config: LanguageModelConfig

    def __init__(self, config: LanguageModelConfig, vocab_size: int, seq_len: int) -> None:
        super().__init__(config, vocab_size, seq_len)
        self.config = config
        shape = config.shape(vocab_size, seq_len)
        self.shape: ModelShape = shape
        self.embedding_scale = math.sqrt(shape.d_model)
        self.embedding = nn.Embedding(shape.vocab_size, shape.d_model)
        self.position = ABSOLUTE_POSITIONS.of(config.position.absolute)(config.position.absolute, shape)
        self.dropout = Dropout(config.dropout, EMBEDDING_SITE)
        self.build_body()
        self.final_norm = None if config.residual == "post_norm" else NORMS.of(config.norm)(config.norm, shape.d_model)
        if not config.tied_head:
            self.head = Head(shape.d_model, shape.vocab_size, bias=config.head_bias)
        elif config.head_bias:
            self.head_bias_V = nn.Parameter(torch.empty(shape.vocab_size))
        self._check_augmentation(seq_len)

    @abstractmethod
    def build_body(self) -> None:
        """Allocate what stands between embedding and final norm, of ``self.config`` and ``self.shape``."""

    @abstractmethod
    def reset_body(self, init: Init) -> None:
        """Fill the body's parameters."""

    def auxiliary(self, carry: Carry) -> Mapping[str, Aux]:
        """The auxiliary terms of an objective from what the body left."""
        return carry.aux

    @staticmethod
    def ends_cost(config: LanguageModelConfig, shape: ModelShape) -> Cost:
        """What is not the body."""
        V, D = shape.vocab_size, shape.d_model
        tables = V * D * (1 if config.tied_head else 2)
        cost = Cost(parameters=tables + V * config.head_bias, embedding_parameters=tables, forward_flops_per_token=2.0 * V * D)
        cost += ABSOLUTE_POSITIONS.of(config.position.absolute).cost(config.position.absolute, shape)
        return cost + Cost(parameters=0 if config.residual == "post_norm" else NORMS.of(config.norm).n_parameters(config.norm, D))

    def max_length(self) -> int | None:
        return self.position.max_length()

    def grow_from(self, base: Any) -> None:
        self.embedding_scale = base.embedding_scale

    def reset_parameters(self, init: Init) -> None:
        """Embedding and head by the scheme, biases of a tied head 0; each component its own."""
        self.reset_embedding(init)
        self.position.reset_parameters(init)
        self.reset_body(init)
        if self.final_norm is not None:
            self.final_norm.reset_parameters(init)
        if not self.config.tied_head:
            init.linear(self.head)
        elif self.config.head_bias:
            init.constant(self, "head_bias_V", 0.0)

    def reset_embedding(self, init: Init) -> None:
        """By the scheme."""
        init.embedding(self.embedding)

    def _objective(self, x_BTD: Tensor, carry: Carry, labels_BT: Tensor, z_weight: float) -> Objective:
        """Of what the head reads and the body left."""
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
        return Objective(loss.total, loss.loss_sum, loss.z_sum, loss.count, self.auxiliary(carry))

    def _losses(self, x_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Cross-entropy of every label by what the head reads, [B, T]."""
        x_BTD, labels_BT = self.vocabulary.scored(x_BTD, labels_BT)
        weight_VD, bias_V = self._head()
        cap, shard = self.config.head_soft_cap, self.vocabulary.shard
        losses_N = token_cross_entropy(x_BTD.flatten(0, 1), weight_VD, bias_V, labels_BT.flatten(), soft_cap=cap, shard=shard)
        return self.vocabulary.rejoin(losses_N.view_as(labels_BT))

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
            x_BTD = x_BTD * self.embedding_scale
        position_BT, longest = seq.position_BT, self.config.position.start_augmentation
        if longest is not None and seq.seed is not None:
            start_B = uniform_integers(seq.seed, seq.row_B, AUGMENTATION_SITE, longest - seq.length + 1)
            position_BT = position_BT + start_B[:, None]
        out: Tensor = self.dropout(self.position(x_BTD, position_BT), seq)
        return out

    def _normed(self, x_BTD: Tensor) -> Tensor:
        """What the head reads."""
        x_BTD = x_BTD if self.final_norm is None else self.final_norm(x_BTD)
        return x_BTD if self.output_multiplier == 1 else x_BTD * self.output_multiplier

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


class CausalLanguageModel(LanguageModel):
    """A language model whose every token is predicted from those before it, by one body. Subclasses write the body."""

    @abstractmethod
    def body(self, x_BTD: Tensor, seq: SequenceInfo) -> tuple[Tensor, Carry]:
        """From the embedded tokens to what the final norm reads, [B, T, D] both."""

    def forward(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor, z_weight: float = 0.0) -> Objective:
        x_BTD, carry = self._hidden(tokens_BT, seq)
        return self._objective(x_BTD, carry, labels_BT, z_weight)

    def token_losses(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor) -> Tensor:
        return self._losses(self._hidden(tokens_BT, seq)[0], labels_BT)

    def logits(self, tokens_BT: Tensor, seq: SequenceInfo) -> Tensor:
        x_BTD, _ = self._hidden(tokens_BT, seq)
        return self.vocabulary.rejoin(self._logits(x_BTD))

    def block_state(self, block: Block, n_rows: int) -> State:
        """The state of ``block`` before the first token; a ConfigError where it cannot decode."""
        if not isinstance(block.mixer, SequenceMixer):
            name = type(block.mixer).__qualname__
            raise ConfigError(f"block {block.layer}: {name} is no SequenceMixer, so it cannot decode a token at a time")
        weight = self.embedding.weight
        return block.mixer.initial_state(n_rows, weight.dtype, weight.device)

    def _hidden(self, tokens_BT: Tensor, seq: SequenceInfo) -> tuple[Tensor, Carry]:
        x_BTD, carry = self.body(self._embed(tokens_BT, seq), seq)
        return self._normed(x_BTD), carry
