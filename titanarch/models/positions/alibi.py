"""ALiBi (arXiv:2108.12409): a penalty linear in the distance, a slope a head.

Shapes: H heads, N distances.
"""

import torch
from torch import Tensor

from titanarch.contract.card import Card
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.position import RelativePosition, RelativePositionConfig, relative_position
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry


def slopes(n_heads: int, device: torch.device) -> Tensor:
    """2^(-8k / n), k = 1 .. n, for n a power of two; else those of the power below, then every second of twice that.

    fp32 [H].
    """
    power = 1 << (n_heads.bit_length() - 1)
    exponents = torch.arange(1, power + 1, dtype=torch.float32, device=device) * (8.0 / power)
    if power < n_heads:
        between = torch.arange(1, 2 * (n_heads - power), 2, dtype=torch.float32, device=device) * (4.0 / power)
        exponents = torch.cat((exponents, between))
    return torch.exp2(-exponents)


class AlibiConfig(RelativePositionConfig):
    """No keys."""


@relative_position("alibi")
class Alibi(RelativePosition):
    """logit -= slope_h |distance|, of the true distance, so it holds with sinks and soft-caps too."""

    Config = AlibiConfig
    card = Card(
        "ALiBi: a penalty linear in the distance",
        "arXiv:2108.12409",
        "transformers build_alibi_tensor (Bloom), build_mpt_alibi_tensor; x-transformers AlibiPositionalBias",
    )
    has_table = True
    place: Tensor

    def __init__(self, config: AlibiConfig, shape: ModelShape, layer: int, n_heads: int, head_dim: int) -> None:
        super().__init__(config, shape, layer, n_heads, head_dim)
        self.n_heads = n_heads
        # There is no parameter to tell the device from: an empty buffer moves with the model instead.
        self.register_buffer("place", torch.empty(0), persistent=False)

    @staticmethod
    def cost(config: AlibiConfig, shape: ModelShape, layer: int, n_heads: int, head_dim: int) -> Cost:
        return Cost()

    def reset_parameters(self, init: Init) -> None:
        """No parameters."""

    def forward(self, n_distances: int, bidirectional: bool, carry: Carry) -> tuple[Tensor, Carry]:
        """fp32 [H, N]; see ``RelativePosition.forward``."""
        first = 1 - n_distances if bidirectional else 0
        distance_N = torch.arange(first, n_distances, dtype=torch.float32, device=self.place.device)
        return -slopes(self.n_heads, self.place.device)[:, None] * distance_N.abs(), carry
