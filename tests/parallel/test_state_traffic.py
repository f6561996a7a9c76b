"""What STATE sends does not grow with the sequence: the bytes of a mix step's collectives, forward and backward, at T and 4 T."""

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_distributed
from tests.fixtures.toy_ssm import ToySSM, ToySSMConfig
from titanarch.contract.init import Init, InitConfig, qualified_names
from titanarch.contract.mixer import RecurrentMixer
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import ContextParallel
from titanarch.models.mixers.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
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


def mixer_of(name: str, length: int) -> RecurrentMixer:
    shape = ModelShape(d_model=D, vocab_size=32, seq_len=length, layers=("mixer",))
    mixer = ToySSM(ToySSMConfig(), shape, 0) if name == "toy_ssm" else GatedDeltaNet(GatedDeltaNetConfig(n_heads=2), shape, 0)
    mixer.reset_parameters(Init(InitConfig(), names=qualified_names(mixer), seed=1, n_layers=1))
    return mixer


def bytes_of_a_mix() -> dict[tuple[str, int], int]:
    counted = {}
    for name in ("toy_ssm", "gated_delta_net"):
        for length in (16, 64):
            mixer, layout = mixer_of(name, length), ContextLayout(dist.group.WORLD, head_tail=False)
            apply_context_parallel(mixer, layout, ContextParallel.STATE)
            seq = layout.divide(SequenceInfo.whole(1, length))
            streams, _ = mixer.project(layout.own(torch.randn(1, length, D), 1), seq, Carry.empty())
            streams = {key: stream.detach().requires_grad_() for key, stream in streams.items()}  # halos of convolutions end before
            head_params, _ = mixer.head_params(seq, Carry.empty())
            with ReceivedBytes() as received:
                result = mixer.mix_step(mixer, streams, head_params, MixSequence(query=seq, key=seq))
                result.y_BTHV.square().sum().backward()
            counted[name, length] = received.total
    return counted


def test_what_state_sends_does_not_grow_with_the_sequence() -> None:
    for counted in run_distributed(bytes_of_a_mix, DEGREE):
        # With the halos of its convolution, which is in its mix step.
        assert counted["toy_ssm", 16] == counted["toy_ssm", 64]
        # (M [K, K], P [V, K]) of every process and head is gathered; their gradients come back summed, one process's share of them.
        H, K, V = 2, D // 2, 2 * (D // 2)
        shard = H * (K * K + V * K) * FP32
        assert counted["gated_delta_net", 16] == counted["gated_delta_net", 64] == shard * DEGREE + shard
