"""What STATE sends does not grow with the sequence: the bytes of a mixer's collectives, forward and backward, at T and 4 T.

Those of its convolutions and token shifts are among them."""

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import titanarch.models.components  # noqa: F401 (registers all)
from tests.distributed import run_distributed
from titanarch.contract.init import Init, InitConfig, qualified_names
from titanarch.contract.mixer import MIXERS, RecurrentMixer
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import ContextParallel
from titanarch.parallel.context_layout import ContextLayout
from titanarch.parallel.context_parallel import apply_context_parallel

D, DEGREE, FP32 = 16, 2, 4
COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_to_all_single")


class ReceivedBytes(TorchDispatchMode):
    """Adds up what collectives give a process, be it in a forward or a backward."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional" and func._schema.name.split("::")[1] in COLLECTIVES:
            self.total += out.numel() * out.element_size()
        return out


SHIFTS = 3
"""Tokens before its own that a convolution of four taps reads, one gather each."""
H, K = 2, D // 2
SENT: dict[str, tuple[int, int, int]] = {
    # Mamba-2: 4 heads of 8 channels, 128 state channels; the default width is 2 D. The others: H heads, K channels of a key.
    "mamba2": (4, 4 * 128 * 8, SHIFTS * (2 * D + 2 * 128)),
    "gla": (H * K // 2, H * (K // 2) * K, 0),
    "retnet": (H, H * K * 2 * K, 0),
    "gated_delta_net": (H * K * K, H * 2 * K * K, SHIFTS * 4 * D),
    "kda": (H * K * K, H * K * K, SHIFTS * 3 * D),
    "rwkv7": (H * K * K, H * K * K, D),
}
"""Numbers that a process sends of a row: the decay of its tokens, the state that they leave, and the last tokens for halos."""
FIXED = {"retnet": H}
"""Of those, numbers without a gradient."""


def mixer_of(name: str, length: int) -> RecurrentMixer:
    shape = ModelShape(d_model=D, vocab_size=32, seq_len=length, layers=(name,))
    config = MIXERS.resolve({"kind": name} if name == "mamba2" else {"kind": name, "n_heads": H})
    mixer = MIXERS.of(config)(config, shape, 0)
    assert isinstance(mixer, RecurrentMixer)
    mixer.reset_parameters(Init(InitConfig(), names=qualified_names(mixer), seed=1, n_layers=1))
    return mixer


def received_bytes() -> dict[tuple[str, int], int]:
    """Of a forward and a backward, by mixer and length."""
    counted = {}
    for name in SENT:
        for length in (16, 64):
            mixer, layout = mixer_of(name, length), ContextLayout(dist.group.WORLD, head_tail=False)
            apply_context_parallel(mixer, layout, ContextParallel.STATE)
            seq = layout.divide(SequenceInfo.whole(1, length))
            x = layout.own(torch.randn(1, length, D), 1).requires_grad_()
            with ReceivedBytes() as received:
                y, _ = mixer(x, seq, Carry.empty())
                y.square().sum().backward()
            counted[name, length] = received.total
    return counted


def test_what_state_sends_does_not_grow_with_the_sequence() -> None:
    """What every process sends is gathered, and the gradients come back summed, one process's share of them."""
    recurrent = [name for name in MIXERS if issubclass(MIXERS[name], RecurrentMixer)]
    assert set(SENT) == {name for name in recurrent if MIXERS[name].__module__.startswith("titanarch.models.")}
    for counted in run_distributed(received_bytes, DEGREE):
        for name, sent in SENT.items():
            assert counted[name, 16] == counted[name, 64] == FP32 * (DEGREE * sum(sent) + sum(sent) - FIXED.get(name, 0)), name
