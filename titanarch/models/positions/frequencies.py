"""The geometric series of frequencies behind sinusoids, rotations and Fourier features."""

import torch
from torch import Tensor


def inverse_frequencies(dim: int, theta: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """theta^(-2i / dim) for i = 0 .. dim/2 - 1, radians a token; [dim / 2] of ``dtype``.

    Computed on the device at every use: a buffer would hold garbage after ``to_empty``, and copying a constant from
    the host would wait for the device.
    """
    exponents = torch.arange(0, dim, 2, dtype=dtype, device=device) / dim
    return 1.0 / (theta**exponents)
