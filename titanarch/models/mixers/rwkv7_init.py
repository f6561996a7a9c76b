"""Initial weights of RWKV-7, as published in BlinkDL/RWKV-LM (RWKV-v7): what ``Init.fill`` takes.

Shapes: [H, K] stands for D = H K channels in order, S shifts. Block ``layer`` of ``n_layers``, from 0.
"""

import math

import torch
from torch import Generator, Size, Tensor, nn

from titanarch.contract.init import Draw

SHIFT_POWERS = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)
"""Of r, w, k, v, a, g in the first block."""


def orthogonal(gain: float, *, transposed: bool = False) -> Draw:
    """Orthogonal rows or columns times ``gain``.

    ``transposed``: a factor [D, R] that the publication holds as [R, D], where the gain is times sqrt(R / D) if R > D.
    """

    def draw(shape: Size, generator: Generator) -> Tensor:
        grown = gain * max(1.0, math.sqrt(shape[1] / shape[0])) if transposed else gain
        return nn.init.orthogonal_(torch.empty(shape), gain=grown, generator=generator)

    return draw


def linear_ramp(shape: Size) -> Tensor:
    """From -1/2 to 1/2 over all channels."""
    return torch.linspace(-0.5, 0.5, shape.numel()).reshape(shape)


def zigzag(shape: Size) -> Tensor:
    """From -1 to 1 over the channels of each head, x |x| of a line."""
    line = torch.linspace(-1.0, 1.0, shape[-1])
    return (line * line.abs()).expand(shape)


def decay_bias(layer: int, n_layers: int) -> Draw:
    """-6 + 6 (i / (D - 1))^p + 0.5 + 2.5 zigzag, p from 1 in the first block to 2 in the last."""
    power = 1 + (layer / max(n_layers - 1, 1)) ** 0.3
    return lambda shape, _: -6 + 6 * (linear_ramp(shape) + 0.5) ** power + 0.5 + 2.5 * zigzag(shape)


def rate_bias(shape: Size, generator: Generator) -> Tensor:
    """-0.19 + 0.3 zigzag + 0.4 ramp."""
    return -0.19 + 0.3 * zigzag(shape) + 0.4 * linear_ramp(shape)


def shift_ramps(layer: int, n_layers: int) -> Draw:
    """[S, D]: 1 - (i / D)^p, p a power of each shift that falls to almost 0 in the last block."""

    def draw(shape: Size, generator: Generator) -> Tensor:
        powers_S1 = torch.tensor(SHIFT_POWERS)[:, None] * (1 - layer / n_layers)
        return 1 - (torch.arange(shape[1]) / shape[1]) ** powers_S1

    return draw


def gain_of_layer(layer: int, n_layers: int) -> float:
    """((layer + 1) / n_layers)^0.7."""
    return float(((layer + 1) / n_layers) ** 0.7)
