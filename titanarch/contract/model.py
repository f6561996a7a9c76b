"""Models: what the trainer, the evaluators and parallel/ know of one.

Shapes: B rows, T tokens, D model dim, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from torch import Tensor, nn

from titanarch.config.registry import ComponentConfig, Registry
from titanarch.contract.card import Card
from titanarch.contract.channel import ChannelMixer
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.mixer import State
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.side_channels import Aux
from titanarch.contract.vocabulary import Vocabulary
from titanarch.ops.cross_entropy import IGNORED

Technique = Literal["context_parallel", "sequence_parallel", "tensor_parallel", "recomputation", "float8", "scoring_windows"]


class ModelConfig(ComponentConfig):
    """The [model] table; ``name`` picks the model spec."""

    def extra_tokens(self) -> int:
        """Rows of the embedding that the model needs beside the tokenizer's, which are the last."""
        return 0


class Objective(NamedTuple):
    """What one micro-batch adds to the objective; all fp32 scalars.

    ``total``: summed over its valid targets and differentiated. ``loss_sum``, ``z_sum``: the cross-entropy and the
    squared log-partition in it, summed, without gradient. ``n_targets``: valid targets. ``aux``: see Aux.
    """

    total: Tensor
    loss_sum: Tensor
    z_sum: Tensor
    n_targets: Tensor
    aux: Mapping[str, Aux]


def _of_all_rows(value: Tensor) -> Tensor:
    """All rows are here."""
    return value


class Model(nn.Module, ABC):
    """Token embedding, blocks, final norm, head. Embedding, head and loss run inside the root's forward.

    Subclasses take ``(config, vocab_size, seq_len)`` and are built on the meta device first.
    """

    Config: ClassVar[type[ModelConfig]]
    card: ClassVar[Card | None] = None
    flavors: ClassVar[Mapping[str, Mapping[str, Any]]]
    """Named sizes: defaults of the [model] table."""
    fsdp_units: ClassVar[Literal["blocks", "root"]] = "blocks"
    """Whether each block is an FSDP unit, or the root alone (models that differentiate inside their forward)."""
    vocabulary_parameters: ClassVar[frozenset[str]] = frozenset({"embedding.weight", "head.weight", "head.bias", "head_bias_V"})
    """Names of the parameters whose dimension 0 is the vocabulary, where the model has them."""
    vocabulary: Vocabulary = Vocabulary()
    """Embeds tokens and says which are scored here; parallel/ replaces it."""
    refuses: ClassVar[Mapping[Technique, str]] = {}
    """Why a technique cannot be used with this model, as the end of a sentence. ``scoring_windows``: every token by those before it."""
    sum_over_rows: Callable[[Tensor], Tensor] = staticmethod(_of_all_rows)
    """Sums a tensor without gradient, which it may overwrite, over the processes that have other rows; parallel/ replaces it."""

    _updates: list[Callable[[], None]] | None = None
    """Of the channel mixers that have something to do after an update, found at the first."""
    output_multiplier: float = 1.0
    """Factor of what the head reads, or of what it gives; the maximal update parametrization sets it."""

    @abstractmethod
    def __init__(self, config: Any, vocab_size: int, seq_len: int) -> None:
        """``vocab_size``: rows of the embedding. ``seq_len``: longest sequence trained on, tokens."""
        super().__init__()

    @staticmethod
    @abstractmethod
    def cost(config: Any, vocab_size: int, seq_len: int) -> Cost:
        """Exact parameter counts, and forward FLOPs a token at ``seq_len``."""

    @abstractmethod
    def blocks(self) -> Iterator[nn.Module]:
        """The repeated units, first one first: what activation checkpointing and FSDP wrap."""

    def grow_from(self, base: Any) -> None:
        """Keep the factors that the model takes from its own width as ``base``, the same model at another width, has them.

        ``contract.width`` calls it; blocks and mixers are no part of it. Nothing to do unless overridden.
        """

    def compiled(self) -> Iterator[nn.Module]:
        """What becomes one graph each where compile is on: the blocks, unless more must be in one graph."""
        return self.blocks()

    @abstractmethod
    def reset_parameters(self, init: Init) -> None:
        """Fill every parameter of every component through ``init``."""

    @abstractmethod
    def forward(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor, z_weight: float = 0.0) -> Objective:
        """The objective on next-token labels; label -100 is no target. ``z_weight``: of squared log-partition."""

    @abstractmethod
    def token_losses(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor) -> Tensor:
        """Cross-entropy of every token, fp32 nats [B, T], 0 where the label is -100; never whole logits."""

    @abstractmethod
    def logits(self, tokens_BT: Tensor, seq: SequenceInfo) -> Tensor:
        """Next-token logits, fp32 [B, T, V]."""

    def count_targets(self, labels_BT: Tensor, seq: SequenceInfo) -> int:
        """Valid targets of whole rows, on the host, as ``forward`` and ``token_losses`` sum over them."""
        return int(np.count_nonzero(labels_BT.numpy() != IGNORED))

    def after_update(self) -> None:
        """Called after every update of the parameters; parallel/ may add to it."""
        if self._updates is None:
            channels = [module for module in self.modules() if isinstance(module, ChannelMixer)]
            self._updates = [channel.after_update for channel in channels if type(channel).after_update is not ChannelMixer.after_update]
        for update in self._updates:
            update()

    def after_skip(self) -> None:
        """Called where the update of a step is not made, in place of ``after_update``."""
        for module in self.modules():
            if isinstance(module, ChannelMixer):
                module.after_skip()

    def max_length(self) -> int | None:
        """Longest row the model can read, tokens, or None where any length works."""
        return None

    def initial_state(self, n_rows: int) -> list[State]:
        """Each block's state before the first token, for ``step``."""
        raise NotImplementedError(f"{type(self).__qualname__} cannot decode a token at a time")

    def step(self, tokens_B1: Tensor, index: int, states: list[State]) -> tuple[Tensor, list[State]]:
        """Logits [B, V] after token number ``index`` of each row, and the new states."""
        raise NotImplementedError(f"{type(self).__qualname__} cannot decode a token at a time")


MODELS: Registry[Model] = Registry("model", key="name")
model = MODELS.register
