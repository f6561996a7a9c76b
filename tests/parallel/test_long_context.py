"""What context parallelism is for: a process keeps its share of what one process keeps for the backward."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import titanarch.models.components  # noqa: F401 (registers all)
from tests.distributed import run_distributed
from tests.parallel.divided import divided_decoder
from titanarch.contract.sequence import SequenceInfo

T, VOCAB = 1024, 64
MODEL = {"n_layers": 2, "d_model": 16, "n_heads": 2, "position": {"relative": "alibi"}, "channel": {"kind": "mlp", "activation": "gelu"}}


def kept_bytes(parallelism: dict[str, Any]) -> tuple[int, float]:
    """Bytes that a forward keeps for its backward, each storage once; and the loss summed over all processes."""
    model, _ = divided_decoder(MODEL, vocab_size=VOCAB, seq_len=T, parallelism=parallelism)
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    tokens = torch.randint(VOCAB, (1, T), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        found = model(tokens, SequenceInfo.whole(1, T), tokens)
    loss_sum = found.loss_sum.detach().clone()
    dist.all_reduce(loss_sum)
    return sum(x.untyped_storage().nbytes() for x in kept.values()), float(loss_sum)


def by_method(methods: list[str]) -> dict[str, tuple[int, float]]:
    return {m: kept_bytes({"context_parallel_degree": dist.get_world_size(), "context_parallel_method": m}) for m in methods}


def test_a_quarter_of_the_activations_on_each_of_four_processes() -> None:
    alone, loss = run_distributed(kept_bytes, 1, {})[0]
    for found in run_distributed(by_method, 4, ["ring"]):
        for method, (kept, divided_loss) in found.items():
            assert abs(divided_loss - loss) <= 1e-5 * loss
            assert kept <= 0.3 * alone, (method, kept / alone)
