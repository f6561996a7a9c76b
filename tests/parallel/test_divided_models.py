"""Whole models under tensor and context parallelism: the losses and gradients of one process."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import titanarch.models.components  # noqa: F401 (registers all)
from tests.distributed import run_distributed
from tests.parallel.divided import SEED, divided_decoder
from titanarch.contract.init import Init, qualified_names
from titanarch.contract.sequence import SequenceInfo
from titanarch.models.decoder import Decoder, DecoderConfig

T = 16
EVERYTHING: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 4,
    "dropout": 0.1,
    "channel": {"kind": "swiglu", "d_ff": 24, "dropout": 0.1, "bias": True},
    "norm": {"kind": "layernorm"},
    "position": {"absolute": "scaled_sinusoidal", "relative": ["linear_cpb", "rotary"], "start_augmentation": 40},
    "mixers": {
        "attention": {"n_kv_heads": 2, "sinks": True, "qk_norm": True, "dropout": 0.1, "out_bias": True, "value_residual": "learned"}
    },
    "tied_head": True,
    "head_bias": True,
}
PLAIN: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 4,
    "channel": "mlp",
    "position": {"absolute": "learned", "relative": "alibi"},
}
MODELS: dict[str, tuple[dict[str, Any], int]] = {"everything": (EVERYTHING, 40), "odd_vocabulary": (PLAIN, 41), "plain": (PLAIN, 40)}
BOUNDS = {"everything": 1e-6}
"""Sinks and the networks of position biases compute in fp32 in any model."""
TP2, CP2 = {"tensor_parallel_degree": 2}, {"context_parallel_degree": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, TP2),
    "tp2 without sequence parallelism": (2, {**TP2, "enable_sequence_parallel": False}),
    "tp2 without loss parallelism": (2, {**TP2, "enable_loss_parallel": False}),
    "tp2 without either": (2, {**TP2, "enable_sequence_parallel": False, "enable_loss_parallel": False}),
    "cp2 gather": (2, {**CP2, "context_parallel_method": "gather"}),
    "cp2 heads": (2, {**CP2, "context_parallel_method": "heads"}),
    "cp2 gather contiguous": (2, {**CP2, "context_parallel_method": "gather", "context_parallel_load_balance": "contiguous"}),
    "cp2 ring": (2, {**CP2, "context_parallel_method": "ring"}),
    "tp2 cp2": (4, {**TP2, **CP2}),
    "tp2 cp2 ring": (4, {**TP2, **CP2, "context_parallel_method": "ring"}),
    "fsdp2 in host memory": (2, {"enable_cpu_offload": True}),
    "fsdp2 tp2": (4, TP2),
    "fsdp2 cp2": (4, CP2),
    "replicate2 tp2": (4, {**TP2, "data_parallel_replicate_degree": 2}),
}


def build(name: str, parallelism: dict[str, Any] | None) -> tuple[Decoder, Any]:
    """The bare model, or the one divided over the processes, and its mesh."""
    table, vocab_size = MODELS[name]
    if parallelism is not None:
        dtype = torch.get_default_dtype()
        return divided_decoder(table, vocab_size=vocab_size, seq_len=T, parallelism=parallelism, param_dtype=dtype, reduce_dtype=dtype)
    config = DecoderConfig.model_validate(table)
    model = Decoder(config, vocab_size, T)
    model.reset_parameters(Init(config.init, names=qualified_names(model), seed=SEED, n_layers=2))
    return model, None


def rows(vocab_size: int) -> tuple[Tensor, SequenceInfo, Tensor]:
    """Four rows of two documents each, some labels without a target."""
    tokens = torch.randint(vocab_size, (4, T + 1), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    starts = (5, 8, 11, 16)
    for row, start in enumerate(starts):
        labels[row, start - 1] = -100
    seq = SequenceInfo.of_lengths([(start, T - start) for start in starts], seed=0, first_row=7)
    return tokens[:, :-1], seq, labels


def rows_of(rank: int, degree: int, whole: tuple[Tensor, SequenceInfo, Tensor]) -> tuple[Tensor, SequenceInfo, Tensor]:
    tokens, seq, labels = whole
    part = slice(rank * 4 // degree, (rank + 1) * 4 // degree)
    own = replace(seq, position_BT=seq.position_BT[part], document_BT=seq.document_BT[part], row_B=seq.row_B[part])
    return tokens[part], own, labels[part]


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def outcome(name: str, layout: dict[str, Any] | None) -> dict[str, Tensor]:
    """Summed loss, gradients, and per-token results of evaluation; of the rows of all processes."""
    torch.set_default_dtype(torch.float64)
    model, mesh = build(name, layout)
    rank, degree = (0, 1) if mesh is None else (mesh.data_rank, mesh.degrees.data_parallel)
    batch = rows_of(rank, degree, rows(MODELS[name][1]))
    objective = model(*batch, 1e-3)
    sums = torch.stack([objective.loss_sum, objective.z_sum, objective.n_targets.double()])
    objective.total.backward()
    if mesh is not None:
        dist.all_reduce(sums)
    found = {"sums": sums}
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        found[f"weight {key}"], found[f"gradient {key}"] = whole(parameter), whole(parameter.grad)
    tokens, _, labels = batch
    # A length that divides by nothing: divided models pad.
    shorter = SequenceInfo.whole(len(tokens), 13)
    with torch.no_grad():
        found["losses"] = model.token_losses(tokens[:, :13], shorter, labels[:, :13])
        found["logits"] = model.logits(tokens[:, :13], shorter)
    return found


def on_every_process(name: str, world_size: int) -> dict[str, dict[str, Tensor]]:
    return {key: outcome(name, layout) for key, (n, layout) in LAYOUTS.items() if n == world_size}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", list(MODELS))
def test_any_layout_gives_the_losses_and_gradients_of_one_process(name: str, world_size: int) -> None:
    default = torch.get_default_dtype()
    try:
        expected = outcome(name, None)
    finally:
        torch.set_default_dtype(default)
    bound = BOUNDS.get(name, 1e-10)
    for rank, found_by_layout in enumerate(run_distributed(on_every_process, world_size, name, world_size)):
        for layout, found in found_by_layout.items():
            assert found.keys() == expected.keys(), layout
            for key, value in expected.items():
                if key in ("losses", "logits") and len(found[key]) < len(value):  # of the rows that this process reads
                    value = value.chunk(2)[rank * 2 // world_size]
                worst = (found[key] - value).abs().max() / value.abs().max().clamp(min=1e-3)
                assert worst <= bound, f"{layout}, {key}: {worst} of the largest entry"
