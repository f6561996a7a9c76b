"""The short convolution: its kernel on CUDA, replaced, and where that serves. The mixers' tests compare its values."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titanarch.contract.sequence import SequenceInfo
from titanarch.models import short_conv
from titanarch.models.short_conv import ShortConv
from titanarch.ops import recurrence_backend

T = 50


@pytest.mark.parametrize(("bias", "lengths"), [(True, ((40, 1, 9), (50,))), (False, ((50,), (50,)))])
def test_causal_conv1d_is_called_for_the_same_convolution(
    *, bias: bool, lengths: tuple[tuple[int, ...], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is replaced by PyTorch's convolution of each document, with its signature."""

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None, *, seq_idx: Tensor | None, activation: str | None) -> Tensor:
        assert activation is None
        assert x.stride(1) == 1, "documents need channels last"
        sizes = [[T]] * len(x) if seq_idx is None else [row.bincount().tolist() for row in seq_idx]
        rows = [torch.cat([convolved(part) for part in row.split(size, dim=-1)], -1) for row, size in zip(x, sizes, strict=True)]
        assert seq_idx is None or seq_idx.dtype == torch.int32
        return torch.stack(rows)

    def convolved(x_CT: Tensor) -> Tensor:
        return F.conv1d(F.pad(x_CT, (2, 0)), conv.weight_CW[:, None], conv.bias_C, groups=len(x_CT))

    module = ModuleType("causal_conv1d")
    module.causal_conv1d_fn = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)
    generator = torch.Generator().manual_seed(0)
    conv = ShortConv(16, 3, bias=bias, backend="auto")
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(2, T, 16, generator=generator)
    packed = len(lengths[0]) > 1
    seq = SequenceInfo.of_lengths(lengths) if packed else SequenceInfo.whole(2, T)
    expected = conv(x, seq)
    monkeypatch.setattr(short_conv, "convolution", lambda *_: "causal_conv1d")
    torch.testing.assert_close(conv(x, seq), expected, rtol=1e-5, atol=1e-5)


def test_where_the_kernel_of_short_convolutions_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, with 2 to 4 taps and channels in eights, where it is installed and wanted."""
    monkeypatch.setattr(recurrence_backend, "import_failure", lambda package: "")
    x: Any = SimpleNamespace(shape=(1, 4, 16), device=torch.device("cuda"), dtype=torch.bfloat16)
    assert recurrence_backend.convolution("auto", x, 4) == "causal_conv1d"
    assert recurrence_backend.convolution("mamba_ssm", x, 2) == "causal_conv1d"
    assert recurrence_backend.convolution("reference", x, 4) == "reference"
    assert recurrence_backend.convolution("auto", x, 5) == "reference"
    for change in ({"shape": (1, 4, 12)}, {"device": torch.device("cpu")}, {"dtype": torch.float64}):
        other: Any = SimpleNamespace(**{**vars(x), **change})
        assert recurrence_backend.convolution("auto", other, 4) == "reference", change
    monkeypatch.setattr(recurrence_backend, "import_failure", lambda package: "absent")
    assert recurrence_backend.convolution("auto", x, 4) == "reference"


@pytest.mark.gpu
def test_the_kernel_is_the_plain_convolution() -> None:
    pytest.importorskip("causal_conv1d")
    generator = torch.Generator().manual_seed(0)
    kernel, plain = (ShortConv(16, 4, bias=True, backend=backend).cuda() for backend in ("auto", "reference"))
    for parameter in kernel.parameters():
        torch.nn.init.normal_(parameter)
    plain.load_state_dict(kernel.state_dict())
    x = torch.randn(2, T, 16, generator=generator).cuda().requires_grad_()
    seq = SequenceInfo.of_lengths(((40, 1, 9), (20, 28, 2)), device="cuda")

    def outcome(conv: ShortConv) -> list[Tensor]:
        y = conv(x, seq)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *conv.parameters()])]

    torch.testing.assert_close(outcome(kernel), outcome(plain), rtol=1e-4, atol=1e-4)
