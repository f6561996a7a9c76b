"""Blocks of an encoder-decoder.

Shapes: B rows, U tokens of the decoder, D model dim.
"""

from torch import Tensor, nn

from titanarch.contract.channel import ChannelConfig
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.mixer import BaseMixer, MixerConfig
from titanarch.contract.norm import NORMS, Norm, NormConfig
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.models.block import SITES_A_BLOCK, Block, Residual
from titanarch.models.dropout import Dropout
from titanarch.models.encoder_decoder.attention import BidirectionalAttention, CrossAttention
from titanarch.models.mixers.attention import AttentionConfig


class EncoderBlock(Block):
    """A block whose attention looks both ways."""

    @staticmethod
    def mixer_class(mixer: MixerConfig) -> type[BaseMixer]:
        return BidirectionalAttention


class DecoderBlock(Block):
    """A block that reads the encoder between its sequence mixer and its channel mixer.

    The residual scheme holds for the cross-attention as for the others, and no_mixer_residual takes the residual of the sequence
    mixer alone.
    """

    def __init__(
        self,
        shape: ModelShape,
        layer: int,
        *,
        mixer: MixerConfig,
        cross: AttentionConfig,
        channel: ChannelConfig,
        norm: NormConfig,
        residual: Residual,
        dropout: float,
    ) -> None:
        super().__init__(shape, layer, mixer=mixer, channel=channel, norm=norm, residual=residual, dropout=dropout)
        self.cross = CrossAttention(cross, shape, layer)
        self.cross_norms = nn.ModuleList(NORMS.of(norm)(norm, shape.d_model) for _ in range(n_cross_norms(residual)))
        self.cross_dropout = Dropout(dropout, SITES_A_BLOCK * (layer + 1) + 3)

    @staticmethod
    def cross_costs(shape: ModelShape, n_keys: int, *, cross: AttentionConfig, norm: NormConfig, residual: Residual) -> tuple[Cost, Cost]:
        """Of what it has beside a block, a token of the decoder and a token of the encoder."""
        of_query, of_key = CrossAttention.costs(cross, shape.d_model, n_keys)
        norms = Cost(parameters=n_cross_norms(residual) * NORMS.of(norm).n_parameters(norm, shape.d_model))
        return of_query + norms, of_key

    def reset_parameters(self, init: Init) -> None:
        super().reset_parameters(init)
        self.cross.reset_parameters(init)
        for norm in self.cross_norms:
            assert isinstance(norm, Norm)
            norm.reset_parameters(init)

    def _rest(self, x_BTD: Tensor, read_BTD: Tensor, mixed_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Tensor, Carry]:
        x = self._after("mixer", x_BTD, self.mixer_dropout(mixed_BTD, seq))
        across_BUD, carry = self.cross.run(x if self.residual == "post_norm" else self.cross_norms[0](x), seq, carry)
        across_BUD = self.cross_dropout(across_BUD, seq)
        if self.residual == "sandwich":
            across_BUD = self.cross_norms[1](across_BUD)
        x = x + across_BUD
        x = self.cross_norms[0](x) if self.residual == "post_norm" else x
        return self._channelled(x, read_BTD, seq, carry)


def n_cross_norms(residual: Residual) -> int:
    """Norms before or after the cross-attention."""
    return 2 if residual == "sandwich" else 1
