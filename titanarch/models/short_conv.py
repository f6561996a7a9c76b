"""A short causal convolution of each channel, as recurrent mixers have after their projections (arXiv:2312.00752, section 3.4).

Shapes: B rows, T tokens, C channels, W taps.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.layers import local
from titanarch.contract.roles import Kind, Role
from titanarch.contract.sequence import LocalHalo, SequenceInfo
from titanarch.ops._decay_kernels import causal_convolution
from titanarch.ops.recurrence_backend import AUTO, CONVOLUTIONS, REFERENCE, convolution, fits_convolution, note


class ShortConv(nn.Module):
    """y_t = sum over n < W of weight[:, W - 1 - n] x_{t-n}, plus a bias; nothing of another document enters.

    The weights lie as in ``nn.Conv1d(C, C, W, groups=C)``, the last one for the token itself. There is no activation. A child of a
    mixer, called in ``project`` on the output of a COLUMN Linear, it is declared as that Linear is: every parameter is divided
    along its channels. ``n_channels``: of the whole mixer. ``backend``: that of the mixer's recurrence; unless it
    is ``reference``, causal-conv1d serves whole rows on CUDA where it is installed.
    """

    roles: ClassVar[dict[str, Role]] = {"weight_CW": Role(Kind.VECTOR, decay=True)}

    def __init__(self, n_channels: int, taps: int, *, bias: bool, backend: str) -> None:
        super().__init__()
        self.backend = backend
        assert taps >= 1, f"a convolution of {taps} taps"
        self.taps = taps
        self.has_kernel = fits_convolution(taps, n_channels)
        self.weight_CW = nn.Parameter(torch.empty(n_channels, taps))
        self.bias_C = nn.Parameter(torch.empty(n_channels)) if bias else None

    @staticmethod
    def cost(n_channels: int, taps: int, *, bias: bool) -> Cost:
        """``state_bytes``: the tokens before, in 2 bytes a channel."""
        return Cost(n_channels * (taps + bias), 2.0 * n_channels * taps, 2 * n_channels * (taps - 1))

    def note_on(self, device_type: str, compiled: bool) -> str:
        """Who computes it; empty where it is asked for by name."""
        if self.backend == REFERENCE:
            return ""
        return note(AUTO, device_type, compiled=compiled, offered=CONVOLUTIONS if self.has_kernel else ())

    def reset_parameters(self, init: Init) -> None:
        """Weight and bias U(+-1/sqrt(W)), as PyTorch's convolutions."""
        bound = 1 / math.sqrt(self.taps)
        init.uniform(self, "weight_CW", bound)
        if self.bias_C is not None:
            init.uniform(self, "bias_C", bound)

    def forward(self, x_BTC: Tensor, seq: SequenceInfo) -> Tensor:
        """[B, T, C] to [B, T, C] of the local channels, in x's dtype; sums in fp32 at least."""
        weight_CW, bias_C = local(self.weight_CW), None if self.bias_C is None else local(self.bias_C)
        if isinstance(seq.halo, LocalHalo) and convolution(self.backend, x_BTC, self.taps) != REFERENCE:
            return causal_convolution(x_BTC, weight_CW, bias_C, seq.document_BT if seq.packed else None)
        weight_WC = weight_CW.to(torch.promote_types(x_BTC.dtype, torch.float32)).t()
        y = x_BTC * weight_WC[-1]
        before = x_BTC
        for n in range(1, self.taps):
            # Step by step, so that decoding keeps one token for each tap.
            before = seq.previous(before, 1)
            y = y + before * weight_WC[-1 - n]
        if bias_C is not None:
            y = y + bias_C
        return y.to(x_BTC.dtype)
