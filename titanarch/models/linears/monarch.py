"""Monarch matrices (arXiv:2204.00595): two block-diagonal factors with permutations between, M = P' L P R.

An input is cut into K blocks, each block has a matrix in R; the hidden units are dealt out so that each block of L reads some of every
block of R; the outputs are dealt back. 1/K of a dense square matrix' parameters and products, twice.

Shapes: K blocks, P inputs a block, Q hidden units a block, S outputs a block; d_in = K P, d_out = K S, min(d_in, d_out) = K Q.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from titanarch.config.errors import ConfigError
from titanarch.contract.card import Card
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.layers import local
from titanarch.contract.linear import LinearConfig, LinearLayer, linear_layer
from titanarch.contract.roles import VECTOR, Kind, Role

FACTOR = Role(Kind.HIDDEN, decay=False, lr_group="monarch")
"""Factors take a learning rate of their own (arXiv:2406.06248) and no decay, which would act on their product twice."""


class MonarchConfig(LinearConfig):
    """A Monarch layer. Its factors are the learning-rate group ``monarch`` of optimizer.lr_multipliers."""

    n_blocks: Annotated[int, Field(gt=1)] = Field(4, description="diagonal blocks a factor; its square divides the inputs and the outputs")
    init: Literal["unit", "fly", "dense"] = Field(
        "unit",
        description="of each factor: unit: N(0, 1 / inputs of a block), which keeps the variance; fly: U(+-1/sqrt(inputs of a block)), as "
        "published, which divides it by 9; dense: the scheme of [model.init], as if a factor were a whole matrix",
    )


@linear_layer("monarch")
class Monarch(LinearLayer):
    """y = P' L P R x + b. In block k of L the inputs are hidden units k, k + K, k + 2K, ... of every block of R."""

    Config = MonarchConfig
    card = Card("Monarch linear layer", "arXiv:2204.00595", "dense matrix assembled from the factors; SVD of its slices")
    why_not_divided = "every block of its second factor reads hidden units of all blocks of the first, so no division keeps both local"
    roles = {"right_KQP": FACTOR, "left_KSQ": FACTOR, "bias": VECTOR}

    def __init__(self, config: MonarchConfig, d_in: int, d_out: int, *, bias: bool) -> None:
        super().__init__()
        self.config = config
        K, P, Q, S = _sizes(config, d_in, d_out)
        self.right_KQP = nn.Parameter(torch.empty(K, Q, P))
        self.left_KSQ = nn.Parameter(torch.empty(K, S, Q))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    @staticmethod
    def cost(config: MonarchConfig, d_in: int, d_out: int, *, bias: bool) -> Cost:
        K, P, Q, S = _sizes(config, d_in, d_out)
        factors = K * Q * P + K * S * Q
        return Cost(parameters=factors + d_out * bias, forward_flops_per_token=2.0 * factors)

    def reset(self, init: Init, *, residual_of: int | None = None) -> None:
        """Factors as ``init`` of the table says, the left one divided as residual outputs are; the bias 0."""
        residual = 1.0 if residual_of is None else init.residual_factor(residual_of)
        for name, factor in (("right_KQP", 1.0), ("left_KSQ", residual)):
            fan_in = self.get_parameter(name).shape[-1]
            if self.config.init == "unit":
                init.normal(self, name, factor / math.sqrt(fan_in))
            elif self.config.init == "fly":
                init.uniform(self, name, factor / math.sqrt(fan_in))
            else:
                init.matrices(self, name, residual_of=residual_of if name == "left_KSQ" else None)
        if self.bias is not None:
            init.constant(self, "bias", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out]."""
        y = monarch(x, local(self.right_KQP), local(self.left_KSQ))
        return y if self.bias is None else y + local(self.bias)


def monarch(x: Tensor, right_KQP: Tensor, left_KSQ: Tensor) -> Tensor:
    """[..., K P] to [..., K S]."""
    K = right_KQP.shape[0]
    hidden = torch.einsum("...kp,kqp->...kq", x.unflatten(-1, (K, -1)), right_KQP)
    dealt = hidden.unflatten(-1, (-1, K)).movedim(-1, -3).flatten(-2)  # [..., K of L, K of R, Q / K] to [..., K, Q]
    return torch.einsum("...kq,ksq->...sk", dealt, left_KSQ).flatten(-2)


def assembled(right_KQP: Tensor, left_KSQ: Tensor) -> Tensor:
    """The dense matrix [K S, K P] of the factors, block by block: outputs s K + l read inputs of block k by rank Q / K."""
    K, Q, _ = right_KQP.shape
    right = right_KQP.unflatten(1, (Q // K, K))  # k, r, l, p
    left = left_KSQ.unflatten(2, (K, Q // K))  # l, s, k, r
    return torch.einsum("lskr,krlp->slkp", left, right).flatten(2).flatten(0, 1)


def projected(dense_OI: Tensor, n_blocks: int) -> tuple[Tensor, Tensor]:
    """The factors (right [K, Q, P], left [K, S, Q]) of the Monarch matrix nearest to a dense one in the Frobenius norm.

    The slices of the matrix between a block of inputs and a block of outputs are independent, and each has rank Q / K, 1 where K^2 is
    the smaller size: so each is cut to its largest singular values. Raises ConfigError where the sizes do not divide.
    """
    K, P, Q, S = _sizes(MonarchConfig(n_blocks=n_blocks), dense_OI.shape[1], dense_OI.shape[0])
    slices = dense_OI.unflatten(0, (S, K)).unflatten(2, (K, P)).permute(1, 2, 0, 3)  # l, k, s, p
    u, values, vt = torch.linalg.svd(slices, full_matrices=False)
    rank = Q // K
    root = values[..., :rank].sqrt()
    left = (u[..., :rank] * root[..., None, :]).permute(0, 2, 1, 3).flatten(2)  # l, s, (k r)
    right = (vt[..., :rank, :] * root[..., None]).permute(1, 2, 0, 3).flatten(1, 2)  # k, (r l), p
    return right.contiguous(), left.contiguous()


def _sizes(config: MonarchConfig, d_in: int, d_out: int) -> tuple[int, int, int, int]:
    """K, P, Q, S."""
    K = config.n_blocks
    if d_in % K or d_out % K or min(d_in, d_out) % (K * K):
        raise ConfigError(
            f"linear layer 'monarch': {d_in} inputs and {d_out} outputs do not make {K} blocks that all meet: n_blocks ({K}) must divide "
            f"both, and its square the smaller one; change n_blocks, d_model or d_ff"
        )
    return K, d_in // K, min(d_in, d_out) // K, d_out // K
