"""The dense linear layer: a matrix and, where wanted, a bias."""

from titanarch.contract.card import Card
from titanarch.contract.cost import Cost, linear_cost
from titanarch.contract.init import Init
from titanarch.contract.layers import Linear
from titanarch.contract.linear import LinearConfig, LinearLayer, linear_layer


class DenseConfig(LinearConfig):
    """No keys."""


@linear_layer("dense")
class Dense(Linear, LinearLayer):
    """y = x W^T + b."""

    Config = DenseConfig
    card = Card("dense linear layer", "-", "torch.nn.Linear")
    takes_float8 = True

    def __init__(self, config: DenseConfig, d_in: int, d_out: int, *, bias: bool) -> None:
        super().__init__(d_in, d_out, bias=bias)

    @staticmethod
    def cost(config: DenseConfig, d_in: int, d_out: int, *, bias: bool) -> Cost:
        return linear_cost(d_in, d_out, bias=bias)

    def reset(self, init: Init, *, residual_of: int | None = None) -> None:
        """By the scheme, as a linear or as a residual output."""
        if residual_of is None:
            init.linear(self)
        else:
            init.residual_output(self, residual_of)
