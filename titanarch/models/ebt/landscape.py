"""The energy of a prediction given its contexts, and its gradient.

    E_t = w . N(blocks(e_t; contexts up to t)),    u = d(sum_t E_t) / d e

Contexts never see predictions, so they are read once and hold for every step that shares a landscape. ``torch.func.grad``
makes u: unlike ``autograd.grad`` it may stand inside a compiled graph, whose backward then has the second derivatives.

Shapes: B rows, T tokens, D model dim, M landscapes (steps with an embedding of their own).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from titanarch.contract.channel import CHANNELS
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.layers import Linear, local
from titanarch.contract.norm import NORMS, Norm
from titanarch.contract.roles import EMBEDDING, HEAD, Role
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.models.ebt.attention import Keys, LayerContext, attend_contexts, attend_predictions, per_query_head
from titanarch.models.ebt.config import EBTConfig
from titanarch.models.mixers.attention import Attention


class EnergyBlock(nn.Module):
    """A pre-norm block that serves both streams with the same weights. ``forward`` reads contexts.

    Of the contexts nothing but keys and values is read, so the last block computes no more of them.
    """

    def __init__(self, config: EBTConfig, shape: ModelShape, layer: int) -> None:
        super().__init__()
        mixer = config.attention
        self.is_last = layer == shape.n_layers - 1
        self.mixer = Attention(mixer, shape, layer)
        self.mixer_norm = NORMS.of(config.norm)(config.norm, shape.d_model)
        self.channel = None if config.channel.kind == "none" else CHANNELS.of(config.channel)(config.channel, shape, layer)
        self.channel_norm: Norm | None = None if self.channel is None else NORMS.of(config.norm)(config.norm, shape.d_model)

    @staticmethod
    def cost(config: EBTConfig, shape: ModelShape, layer: int) -> Cost:
        """Parameters, and forward FLOPs of a stream without keys of its own."""
        has_channel = config.channel.kind != "none"
        cost = Attention.cost(config.attention, shape, layer)
        cost += Cost(parameters=(1 + has_channel) * NORMS.of(config.norm).n_parameters(config.norm, shape.d_model))
        return cost + CHANNELS.of(config.channel).cost(config.channel, shape) if has_channel else cost

    def reset_parameters(self, init: Init) -> None:
        """Each part its own."""
        for part in (self.mixer, self.mixer_norm, self.channel, self.channel_norm):
            if part is not None:
                part.reset_parameters(init)

    def forward(self, x_BTD: Tensor, step_11D: Tensor | None, seq: SequenceInfo) -> tuple[Tensor, Tensor | None, LayerContext]:
        """Contexts and the step embedding after this block, and what predictions read of them."""
        step_keys = None
        if step_11D is not None:
            step_11D, step_keys = self._read_step(step_11D, seq)
        read_BTD = self.mixer_norm(x_BTD)
        streams, _ = self.mixer.project(read_BTD, seq, Carry.empty())
        context = LayerContext(Keys(streams["k"], streams["v"]), step_keys)
        if self.is_last:
            return x_BTD, step_11D, context
        y_BTHV = attend_contexts(streams["q"], context, seq, self._scale(streams["q"]))
        return self._rest(x_BTD, read_BTD, y_BTHV, seq), step_11D, context

    def judge(self, x_BTD: Tensor, context: LayerContext, seq: SequenceInfo) -> Tensor:
        """Predictions after this block, [B, T, D]."""
        read_BTD = self.mixer_norm(x_BTD)
        streams, _ = self.mixer.project(read_BTD, replace(seq, position_BT=seq.position_BT + 1), Carry.empty())
        q_BTHK = streams["q"]
        y_BTHV = attend_predictions(q_BTHK, Keys(streams["k"], streams["v"]), context, seq, self._scale(q_BTHK))
        return self._rest(x_BTD, read_BTD, y_BTHV, seq)

    def _read_step(self, x_11D: Tensor, seq: SequenceInfo) -> tuple[Tensor, Keys]:
        """The step embedding stands before every document, at position -1, and reads itself alone."""
        zero = torch.zeros(1, 1, dtype=torch.int64, device=x_11D.device)
        alone = replace(seq, position_BT=zero - 1, document_BT=zero, index_T=zero[0], row_B=zero[0], length=1, seed=None, cu_seqlens=None)
        read_11D = self.mixer_norm(x_11D)
        streams, _ = self.mixer.project(read_11D, alone, Carry.empty())
        y_11HV = per_query_head(streams["v"], streams["q"].shape[2])
        return self._rest(x_11D, read_11D, y_11HV, alone), Keys(streams["k"], streams["v"])

    def _rest(self, x_BTD: Tensor, read_BTD: Tensor, y_BTHV: Tensor, seq: SequenceInfo) -> Tensor:
        x_BTD = x_BTD + self.mixer.merge(y_BTHV, read_BTD)
        if self.channel is None or self.channel_norm is None:
            return x_BTD
        out: Tensor = x_BTD + self.channel(self.channel_norm(x_BTD), seq)
        return out

    def _scale(self, q_BTHK: Tensor) -> float:
        scale = self.mixer.config.scale
        return float(q_BTHK.shape[-1] ** -0.5 if scale is None else scale)


class EnergyHead(Linear):
    """w [1, D]."""

    roles: dict[str, Role] = {"weight": HEAD}


class Landscape(nn.Module):
    """Blocks, final norm and energy. ``forward`` gives the gradient, and is what is compiled as a whole."""

    roles: dict[str, Role] = {"step_MD": EMBEDDING}

    def __init__(self, config: EBTConfig, shape: ModelShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EnergyBlock(config, shape, layer) for layer in range(shape.n_layers))
        last_norm = config.final_norm
        self.final_norm = NORMS.of(last_norm)(last_norm, shape.d_model)
        self.head = EnergyHead(shape.d_model, 1, bias=False)
        self.step_MD = nn.Parameter(torch.empty(config.n_steps, shape.d_model)) if config.step_embedding else None

    def reset_parameters(self, init: Init) -> None:
        """Head as a linear of the scheme, the step embedding N(0, std); each block its own."""
        for block in self.blocks():
            block.reset_parameters(init)
        self.final_norm.reset_parameters(init)
        init.linear(self.head)
        if self.step_MD is not None:
            init.normal(self, "step_MD", init.config.std)

    def blocks(self) -> list[EnergyBlock]:
        return [block for block in self.layers if isinstance(block, EnergyBlock)]

    def read(self, x_BTD: Tensor, seq: SequenceInfo, number: int) -> tuple[LayerContext, ...]:
        """Token embeddings to what predictions read in each layer, in landscape ``number``."""
        step_11D = None if self.step_MD is None else local(self.step_MD)[number][None, None]
        contexts = []
        for block in self.layers:
            x_BTD, step_11D, context = block(x_BTD, step_11D, seq)
            contexts.append(context)
        return tuple(contexts)

    def energy(self, e_BTD: Tensor, contexts: tuple[LayerContext, ...], seq: SequenceInfo) -> Tensor:
        """Energies of the embedded predictions, fp32 (fp64) [B, T]."""
        x_BTD = e_BTD
        for block, context in zip(self.blocks(), contexts, strict=True):
            x_BTD = block.judge(x_BTD, context, seq)
        energy_BT: Tensor = self.head(self.final_norm(x_BTD)).squeeze(-1)
        return energy_BT.to(torch.promote_types(energy_BT.dtype, torch.float32))

    def forward(self, e_BTD: Tensor, contexts: tuple[LayerContext, ...], seq: SequenceInfo) -> tuple[Tensor, Tensor]:
        """u [B, T, D], the gradient of the sum of energies, differentiable; and the energies [B, T]."""

        def total(e_BTD: Tensor) -> tuple[Tensor, Tensor]:
            energy_BT = self.energy(e_BTD, contexts, seq)
            return energy_BT.sum(), energy_BT

        u_BTD, energy_BT = torch.func.grad(total, has_aux=True)(e_BTD)
        return u_BTD, energy_BT
