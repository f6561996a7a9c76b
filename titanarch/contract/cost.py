"""What a component costs: counts that studies match, and that MFU is computed from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """``parameters``; ``forward_flops_per_token``, one multiply-add = 2; ``state_bytes`` kept a sequence in decoding.

    FLOPs count matrix products and visible keys only. Training costs three times the forward; the factor is
    applied once, by ``training_flops_per_token``. ``embedding_parameters`` are those of the token embedding and an
    untied head, which matched comparisons leave out; ``idle_parameters`` those that a token does not meet (experts it did not choose).
    """

    parameters: int = 0
    forward_flops_per_token: float = 0.0
    state_bytes: int = 0
    embedding_parameters: int = 0
    idle_parameters: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.parameters + other.parameters,
            self.forward_flops_per_token + other.forward_flops_per_token,
            self.state_bytes + other.state_bytes,
            self.embedding_parameters + other.embedding_parameters,
            self.idle_parameters + other.idle_parameters,
        )

    @property
    def non_embedding_parameters(self) -> int:
        return self.parameters - self.embedding_parameters

    @property
    def active_parameters(self) -> int:
        """Those that one token is computed with."""
        return self.parameters - self.idle_parameters

    @property
    def training_flops_per_token(self) -> float:
        return 3 * self.forward_flops_per_token


def mean_visible_keys(seq_len: int, window: int | None = None) -> float:
    """Keys that a query sees on average in causal attention over ``seq_len`` tokens of one document."""
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return window - window * (window - 1) / (2 * seq_len)


def linear_cost(d_in: int, d_out: int, *, bias: bool = False) -> Cost:
    """A dense matrix applied to every token."""
    return Cost(parameters=d_in * d_out + bias * d_out, forward_flops_per_token=2.0 * d_in * d_out)
