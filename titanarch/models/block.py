"""A block: norms, one sequence mixer, one channel mixer, wired by a residual scheme.

Shapes: B rows, T tokens, D model dim.
"""

from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from titanarch.contract.channel import CHANNELS, ChannelConfig
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.mixer import MIXERS, BaseMixer, MixerConfig, SequenceMixer, State
from titanarch.contract.norm import NORMS, Norm, NormConfig
from titanarch.contract.sequence import MixSequence, SequenceInfo, StepHalo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.models.dropout import Dropout

Residual = Literal["pre_norm", "post_norm", "sandwich", "parallel", "no_mixer_residual"]
"""pre_norm: x + f(N(x)). post_norm: N(x + f(x)). sandwich: x + N(f(N(x))). parallel: x + mixer(N(x)) + channel(N(x))
with one norm. no_mixer_residual: pre_norm, but the sequence mixer's output replaces the stream."""

SITES_A_BLOCK = 4
"""Random-draw sites reserved a block: mixer and channel residual, channel hidden units, and one more."""


def _norm_sites(residual: Residual, has_channel: bool) -> tuple[str, ...]:
    """Names of the norms that a block has."""
    if residual == "parallel":
        return ("mixer_norm",)
    sites = ("mixer_norm", "mixer_out_norm") if residual == "sandwich" else ("mixer_norm",)
    if not has_channel:
        return sites
    return sites + (("channel_norm", "channel_out_norm") if residual == "sandwich" else ("channel_norm",))


class Block(nn.Module):
    """``layer`` counts blocks from 0. ``dropout``: probability on what each mixer adds to the residual stream."""

    def __init__(
        self,
        shape: ModelShape,
        layer: int,
        *,
        mixer: MixerConfig,
        channel: ChannelConfig,
        norm: NormConfig,
        residual: Residual,
        dropout: float,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.layer = layer
        self.mixer = self.mixer_class(mixer)(mixer, shape, layer)
        self.channel = None if channel.kind == "none" else CHANNELS.of(channel)(channel, shape, layer)
        self.norms = nn.ModuleDict({name: NORMS.of(norm)(norm, shape.d_model) for name in _norm_sites(residual, self.channel is not None)})
        self.mixer_dropout = Dropout(dropout, SITES_A_BLOCK * (layer + 1))
        self.channel_dropout = Dropout(dropout, SITES_A_BLOCK * (layer + 1) + 1)

    @staticmethod
    def mixer_class(mixer: MixerConfig) -> type[BaseMixer]:
        """What mixes along the sequence by this table."""
        return MIXERS.of(mixer)

    @classmethod
    def cost(
        cls, shape: ModelShape, layer: int, *, mixer: MixerConfig, channel: ChannelConfig, norm: NormConfig, residual: Residual
    ) -> Cost:
        has_channel = channel.kind != "none"
        n_norms = len(_norm_sites(residual, has_channel))
        cost = cls.mixer_class(mixer).cost(mixer, shape, layer)
        cost += Cost(parameters=n_norms * NORMS.of(norm).n_parameters(norm, shape.d_model))
        return cost + CHANNELS.of(channel).cost(channel, shape) if has_channel else cost

    def reset_parameters(self, init: Init) -> None:
        """Each part its own."""
        self.mixer.reset_parameters(init)
        if self.channel is not None:
            self.channel.reset_parameters(init)
        for norm in self.norms.values():
            assert isinstance(norm, Norm)
            norm.reset_parameters(init)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Tensor, Carry]:
        """The residual stream after this block, [B, T, D], and the carry for later ones."""
        read_BTD = self._before("mixer_norm", x_BTD)
        mixed_BTD, carry = self.mixer.run(read_BTD, seq, carry)
        return self._rest(x_BTD, read_BTD, mixed_BTD, seq, carry)

    def step(self, x_B1D: Tensor, seq: MixSequence, carry: Carry, state: State) -> tuple[Tensor, Carry, State]:
        """One token after ``state``, [B, 1, D]: equals that position of ``forward`` on the whole row.

        The state is the mixer's, and what ``seq.query.previous`` was given anywhere in the block.
        """
        assert isinstance(self.mixer, SequenceMixer), "the model's initial_state checks this"
        halo = StepHalo(state)
        seq = replace(seq, query=replace(seq.query, halo=halo))
        read_B1D = self._before("mixer_norm", x_B1D)
        mixed_B1D, carry, state = self.mixer.step(read_B1D, seq, carry, state)
        x, carry = self._rest(x_B1D, read_B1D, mixed_B1D, seq.query, carry)
        return x, carry, {**state, **halo.kept}

    def _rest(self, x_BTD: Tensor, read_BTD: Tensor, mixed_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Tensor, Carry]:
        """The block after its sequence mixer read ``read`` and gave ``mixed``."""
        x = self._after("mixer", x_BTD, self.mixer_dropout(mixed_BTD, seq))
        return self._channelled(x, read_BTD, seq, carry)

    def _channelled(self, x_BTD: Tensor, read_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Tensor, Carry]:
        """The block after all but its channel mixer."""
        if self.channel is None:
            return x_BTD, carry
        read_BTD = read_BTD if self.residual == "parallel" else self._before("channel_norm", x_BTD)
        out, carry = self.channel.run(read_BTD, seq, carry)
        return self._after("channel", x_BTD, self.channel_dropout(out, seq)), carry

    def _before(self, norm: str, x_BTD: Tensor) -> Tensor:
        out: Tensor = x_BTD if self.residual == "post_norm" else self.norms[norm](x_BTD)
        return out

    def _after(self, part: str, x_BTD: Tensor, added_BTD: Tensor) -> Tensor:
        """The residual stream with what a part adds."""
        if self.residual == "post_norm":
            out: Tensor = self.norms[f"{part}_norm"](x_BTD + added_BTD)
            return out
        if self.residual == "sandwich":
            added_BTD = self.norms[f"{part}_out_norm"](added_BTD)
        if self.residual == "no_mixer_residual" and part == "mixer":
            return added_BTD
        return x_BTD + added_BTD
