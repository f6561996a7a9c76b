"""A stage of H-Net, and the stack inside all stages.

Shapes: B rows, T tokens, S slots for chunks, D model dim, E model dim of the stage inside.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from titanarch.contract.init import Init
from titanarch.contract.norm import NORMS, Norm
from titanarch.models.block import Block
from titanarch.models.hnet.chunks import Chunks, gather_chunks, spread_chunks
from titanarch.models.hnet.config import HNetConfig, Level
from titanarch.models.hnet.router import Residual, Router


class Stack(nn.Module):
    """Blocks, and a norm after them but in post_norm; ``first``: the number of its first block in the level."""

    def __init__(self, config: HNetConfig, level: Level, first: int, n_blocks: int, *, has_norm: bool) -> None:
        super().__init__()
        self.bare_blocks = tuple(
            Block(
                level.shape,
                number,
                mixer=config.mixers[level.shape.layers[number]],
                channel=level.channel,
                norm=config.norm,
                residual=config.residual,
                dropout=config.dropout,
            )
            for number in range(first, first + n_blocks)
        )
        self.layers = nn.ModuleList(self.bare_blocks)
        has_norm = has_norm and config.residual != "post_norm"
        self.norm: Norm | None = NORMS.of(config.norm)(config.norm, level.shape.d_model) if has_norm else None

    def normed(self, x_BTD: Tensor) -> Tensor:
        """What leaves the stack, after its blocks."""
        if self.norm is None:
            return x_BTD
        out: Tensor = self.norm(x_BTD)
        return out

    def reset_parameters(self, init: Init) -> None:
        """Each part its own."""
        for block in self.bare_blocks:
            block.reset_parameters(init)
        if self.norm is not None:
            self.norm.reset_parameters(init)


class Main(Stack):
    """The innermost stack. ``lr_group``: of all its parameters; None for the default."""

    def __init__(self, config: HNetConfig, level: Level) -> None:
        super().__init__(config, level, 0, level.n_encoder, has_norm=True)
        self.lr_group = "main" if config.lr_groups else None


class Stage(nn.Module):
    """Encoder and decoder, the router between tokens and chunks, the residual around what is inside.

    ``lr_group``: of all its parameters; None for the default.
    """

    fp32: ClassVar[frozenset[str]] = frozenset({"router", "residual"})

    def __init__(self, config: HNetConfig, levels: list[Level], number: int) -> None:
        super().__init__()
        level, inner = levels[number], levels[number + 1].shape.d_model
        D, n = level.shape.d_model, level.n_encoder
        self.d_model = D
        self.lr_group = f"stage_{number}" if config.lr_groups else None
        self.capacity = config.stages[number].capacity
        self.encoder = Stack(config, level, 0, n, has_norm=True)
        self.router = Router(D)
        self.residual = Residual(D)
        if inner > D:
            self.pad_P = nn.Parameter(torch.empty(inner - D))
        # After the outermost decoder stands the model's own norm.
        self.decoder = Stack(config, level, n, len(level.shape.layers) - n, has_norm=number > 0)

    def reset_parameters(self, init: Init) -> None:
        """Router: the identity; residual and pad vector: 0; blocks and norms their own."""
        self.encoder.reset_parameters(init)
        self.router.reset_parameters(init)
        self.residual.reset_parameters(init)
        if "pad_P" in self._parameters:
            init.constant(self, "pad_P", 0.0)
        self.decoder.reset_parameters(init)

    def enter(self, x_BTD: Tensor, chunks: Chunks) -> Tensor:
        """The tokens that begin chunks, as wide as the stage inside, [B, S, E]."""
        return self.widened(gather_chunks(x_BTD, chunks))

    def widened(self, x_BSD: Tensor) -> Tensor:
        """With the learned pad vector after the channels of every token."""
        if "pad_P" not in self._parameters:
            return x_BSD
        return torch.cat([x_BSD, self.pad_P.to(x_BSD.dtype).expand(*x_BSD.shape[:-1], -1)], dim=-1)

    def leave(self, x_BTD: Tensor, z_BSE: Tensor, p_BT: Tensor, chunks: Chunks) -> Tensor:
        """What the decoder reads, [B, T, D]: what tokens read of the chunks, plus their residual, summed in fp32 at least."""
        return self.joined(x_BTD, spread_chunks(z_BSE[..., : self.d_model], p_BT, chunks))

    def joined(self, x_BTD: Tensor, read_BTD: Tensor) -> Tensor:
        """What the decoder reads, of the encoder's tokens and what they read of the chunks."""
        out: Tensor = self.residual(read_BTD, x_BTD)
        return out.to(x_BTD.dtype)
