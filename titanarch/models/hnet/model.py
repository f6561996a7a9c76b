"""H-Net: dynamic chunking for hierarchical sequence modelling (arXiv:2507.07955).

A stage's encoder reads tokens, its router cuts them into chunks, everything inside reads chunks alone, and its decoder reads
tokens again. Stages nest; the first sees the text's tokens, and the main stack is inside all.

Shapes: B rows, T tokens, S slots for chunks, D model dim, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from titanarch.config.errors import ConfigError
from titanarch.contract.card import Card
from titanarch.contract.cost import Cost, linear_cost
from titanarch.contract.experts import TokenCounts
from titanarch.contract.init import Init
from titanarch.contract.mixer import State
from titanarch.contract.model import Technique, model
from titanarch.contract.norm import NORMS
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.side_channels import Aux, Carry
from titanarch.models.block import Block
from titanarch.models.hnet.chunks import find_chunks, n_slots
from titanarch.models.hnet.config import HNetConfig, Level
from titanarch.models.hnet.decoding import HNetStates
from titanarch.models.hnet.ratio import ratio_terms, routing_sums
from titanarch.models.hnet.stage import Main, Stack, Stage
from titanarch.models.language_model import CausalLanguageModel


@model("hnet")
class HNet(CausalLanguageModel):
    """Embedding, stages around a main stack, final norm (but in post_norm), head."""

    Config = HNetConfig
    card = Card("learned chunks, read by an inner stack", "arXiv:2507.07955", "a loop over tokens and documents")
    flavors: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    refuses: ClassVar[Mapping[Technique, str]] = {
        "context_parallel": "where its chunks begin depends on the data, so a row's chunks cannot be shared out in equal parts",
        "sequence_parallel": "its stages have different numbers of tokens, and a router reads the token before each",
    }
    config: HNetConfig

    def build_body(self) -> None:
        levels = self.config.levels(self.shape.vocab_size, self.shape.seq_len)
        self.stages = nn.ModuleList(Stage(self.config, levels, number) for number in range(len(self.config.stages)))
        self.main = Main(self.config, levels[-1])
        for stack in self.stacks()[1:-1]:
            counting = [block.layer for block in stack.bare_blocks if any(isinstance(m, TokenCounts) for m in block.modules())]
            if counting:
                raise ConfigError(
                    f"[model] inside the first stage, block {counting[0]} balances experts by counts of tokens, and would count slots "
                    "without a chunk; use another channel there, and experts in the first stage alone"
                )

    @staticmethod
    def cost(config: HNetConfig, vocab_size: int, seq_len: int) -> Cost:
        """FLOPs of what is inside a stage count once in ``ratio`` tokens, as the ratio loss aims at; a run logs what came of it.

        They are computed for every slot all the same, so a capacity far above 1 / ratio costs more than this.
        """
        built, expected = (config.levels(vocab_size, seq_len, expected=e) for e in (False, True))
        cost = CausalLanguageModel.ends_cost(config, built[0].shape)
        for number, (level, seen) in enumerate(zip(built, expected, strict=True)):
            D, is_main = level.shape.d_model, number == len(config.stages)
            n_norms = 0 if config.residual == "post_norm" else 2 - (is_main or number == 0)
            own = Cost(parameters=n_norms * NORMS.of(config.norm).n_parameters(config.norm, D))
            if not is_main:
                pad = built[number + 1].shape.d_model - D
                own += linear_cost(D, D) + linear_cost(D, D) + linear_cost(D, D, bias=True) + Cost(parameters=pad)
            for layer in range(level.shape.n_layers):
                own += replace(_block_cost(config, seen, layer), parameters=_block_cost(config, level, layer).parameters)
            cost += replace(own, forward_flops_per_token=own.forward_flops_per_token * level.share)
        return cost

    def stacks(self) -> list[Stack]:
        """In the order in which a token passes them."""
        stages = self.bare_stages()
        return [*(stage.encoder for stage in stages), self.main, *(stage.decoder for stage in reversed(stages))]

    def bare_stages(self) -> list[Stage]:
        return [stage for stage in self.stages if isinstance(stage, Stage)]

    def blocks(self) -> Iterator[nn.Module]:
        return (block for stack in self.stacks() for block in stack.layers)

    def reset_embedding(self, init: Init) -> None:
        """N(0, embedding_std)."""
        init.normal(self.embedding, "weight", self.config.embedding_std)

    def reset_body(self, init: Init) -> None:
        """Residual outputs are scaled by the blocks that write to their stream: a stage's own and those of the stages outside it."""
        n_blocks = 0
        for stage in self.bare_stages():
            n_blocks += len(stage.encoder.bare_blocks) + len(stage.decoder.bare_blocks)
            stage.reset_parameters(init.with_depth(n_blocks))
        self.main.reset_parameters(init.with_depth(n_blocks + len(self.main.bare_blocks)))

    def body(self, x_BTD: Tensor, seq: SequenceInfo) -> tuple[Tensor, Carry]:
        return self._level(0, x_BTD, seq, None, Carry.empty())

    def _level(self, number: int, x: Tensor, seq: SequenceInfo, real_BT: Tensor | None, carry: Carry) -> tuple[Tensor, Carry]:
        """Stage ``number`` and all inside it: [B, T, D] both. ``real_BT``: False for empty slots, None where there are none.

        Values in the carry pass from a stage's encoder to its decoder, and not into another stage.
        """
        if number == len(self.stages):
            x, carry = _run(self.main, x, seq, carry)
            return self.main.normed(x), carry
        stage = self.bare_stages()[number]
        x, carry = _run(stage.encoder, x, seq, carry)
        x = stage.encoder.normed(x)
        p_BT = stage.router(x, seq)
        chunks = find_chunks(p_BT, seq, real_BT, n_slots(x.shape[1], stage.capacity))
        z, inner = self._level(number + 1, stage.enter(x, chunks), chunks.seq, chunks.real_BS, Carry({}, carry.aux))
        sums = {name: value for name, value in inner.values.items() if name.startswith(ROUTING)}
        sums[f"{ROUTING}{number}"] = routing_sums(p_BT, chunks, real_BT)
        x, carry = _run(stage.decoder, stage.leave(x, z, p_BT, chunks), seq, Carry(carry.values, inner.aux))
        return stage.decoder.normed(x), Carry({**carry.values, **sums}, carry.aux)

    def auxiliary(self, carry: Carry) -> Mapping[str, Aux]:
        """Those of the blocks; the ratio loss, realised tokens a chunk, and dropped boundaries of each stage."""
        sums_SK = torch.stack([carry.values[f"{ROUTING}{number}"] for number in range(len(self.stages))])
        ratios = [stage.ratio for stage in self.config.stages]
        return {**carry.aux, **ratio_terms(sums_SK, ratios, self.sum_over_rows, weight=self.config.ratio_loss_weight)}

    def initial_state(self, n_rows: int) -> list[State]:
        return self._states().initial(0, n_rows)

    def step(self, tokens_B1: Tensor, index: int, states: list[State]) -> tuple[Tensor, list[State]]:
        """Boundaries are where the router says: what a capacity below 1 would drop in a whole row is not dropped here."""
        whole = SequenceInfo.whole(tokens_B1.shape[0], index + 1, device=tokens_B1.device)
        x = self._embed(tokens_B1, whole.some(lambda x, dim: x.narrow(dim, index, 1)))
        x, new_states = self._states().step(0, x, index, states)
        return self._logits(self._normed(x))[:, 0], new_states

    def _states(self) -> HNetStates:
        return HNetStates(self.bare_stages(), self.main, block_state=self.block_state, like=self.embedding.weight)


ROUTING = "hnet.routing."
"""How names of the routers' sums in the carry start."""


def _block_cost(config: HNetConfig, level: Level, layer: int) -> Cost:
    mixer = config.mixers[level.shape.layers[layer]]
    return Block.cost(level.shape, layer, mixer=mixer, channel=level.channel, norm=config.norm, residual=config.residual)


def _run(stack: Stack, x: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Tensor, Carry]:
    for block in stack.layers:
        x, carry = block(x, seq, carry)
    return x, carry
