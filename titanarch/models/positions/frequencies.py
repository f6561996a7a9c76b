"""The geometric series of frequencies behind sinusoids, rotations and Fourier features."""

import torch
from torch import Tensor


def inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i / dim) for i = 0 .. dim/2 - 1, radians a token; fp32 [dim / 2].

    Computed on the device at every use: a buffer would hold garbage after ``to_empty``, and copying a constant from
    the host would wait for the device.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / (theta**exponents)
