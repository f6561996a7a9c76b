"""The decoder: a causal language model of any mixers, channels, norms and position schemes.

Shapes: B rows, T tokens, D model dim, V vocabulary.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from titanarch.contract.card import Card
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.mixer import State
from titanarch.contract.model import model
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.side_channels import Carry
from titanarch.models.block import Block
from titanarch.models.decoder_config import DecoderConfig
from titanarch.models.flavors import FLAVORS
from titanarch.models.language_model import CausalLanguageModel


@model("decoder")
class Decoder(CausalLanguageModel):
    """Token embedding (+ absolute position), blocks, final norm (but in post_norm), head."""

    Config = DecoderConfig
    card = Card(
        "decoder of any mixers, channel mixers, norms and positions",
        "-",
        "transformers GPT2, Llama, Mistral, Qwen3, Gemma2, Cohere, SmolLM3",
    )
    flavors = FLAVORS
    config: DecoderConfig

    def build_body(self) -> None:
        config, shape = self.config, self.shape
        self.bare_blocks = tuple(
            Block(
                shape,
                layer,
                mixer=config.mixers[name],
                channel=config.channel_of(layer),
                norm=config.norm,
                residual=config.residual,
                dropout=config.dropout,
            )
            for layer, name in enumerate(shape.layers)
        )
        self.layers = nn.ModuleList(self.bare_blocks)

    @staticmethod
    def cost(config: DecoderConfig, vocab_size: int, seq_len: int) -> Cost:
        shape = config.shape(vocab_size, seq_len)
        cost = CausalLanguageModel.ends_cost(config, shape)
        for layer, name in enumerate(shape.layers):
            mixer, channel = config.mixers[name], config.channel_of(layer)
            cost += Block.cost(shape, layer, mixer=mixer, channel=channel, norm=config.norm, residual=config.residual)
        return cost

    def blocks(self) -> Iterator[nn.Module]:
        return iter(self.layers)

    def reset_body(self, init: Init) -> None:
        for block in self.bare_blocks:
            block.reset_parameters(init)

    def body(self, x_BTD: Tensor, seq: SequenceInfo) -> tuple[Tensor, Carry]:
        carry = Carry.empty()
        for block in self.layers:
            x_BTD, carry = block(x_BTD, seq, carry)
        return x_BTD, carry

    def initial_state(self, n_rows: int) -> list[State]:
        return [self.block_state(block, n_rows) for block in self.bare_blocks]

    def step(self, tokens_B1: Tensor, index: int, states: list[State]) -> tuple[Tensor, list[State]]:
        whole = SequenceInfo.whole(tokens_B1.shape[0], index + 1, device=tokens_B1.device)
        last = whole.some(lambda x, dim: x.narrow(dim, index, 1))
        x, carry, new_states = self._embed(tokens_B1, last), Carry.empty(), []
        for layer, (block, state) in enumerate(zip(self.bare_blocks, states, strict=True)):
            mixing = MixSequence(query=last, key=whole, site=layer)
            x, carry, state = block.step(x, mixing, carry, state)
            new_states.append(state)
        return self._logits(self._normed(x))[:, 0], new_states
