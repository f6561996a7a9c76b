"""FSDP2 and HSDP: the same initial weights to the bit, the same losses and gradients as one bare process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import titanarch.models.components  # noqa: F401 (registers all)
from tests.distributed import run_distributed
from tests.parallel.divided import SEED, divided_decoder
from titanarch.contract.init import Init, qualified_names
from titanarch.contract.sequence import SequenceInfo
from titanarch.models.decoder import Decoder, DecoderConfig

V, T = 40, 12
TABLE: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 4,
    "channel": {"kind": "swiglu", "d_ff": 24},
    "position": {"absolute": "learned", "relative": ["linear_cpb", "rotary"]},
    "mixers": {"attention": {"n_kv_heads": 2, "sinks": True, "qk_norm": True}},
    "tied_head": True,
    "head_bias": True,
}


def bare_model() -> Decoder:
    config = DecoderConfig.model_validate(TABLE)
    model = Decoder(config, V, T)
    model.reset_parameters(Init(config.init, names=qualified_names(model), seed=SEED, n_layers=2))
    return model


def rows() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(V, (4, T + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def whole(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in parameters.items()}


def one_step(replicate: int, checkpointing: str, dtype_name: str) -> dict[str, Any]:
    """Weights, loss and gradients of a step on this process's share of four rows, two micro-batches where it has two."""
    dtype = getattr(torch, dtype_name)
    model, _ = divided_decoder(
        TABLE,
        vocab_size=V,
        seq_len=T,
        parallelism={"data_parallel_replicate_degree": replicate},
        activation_checkpoint={"mode": checkpointing},
        param_dtype=dtype,
    )
    weights = whole(dict(model.named_parameters()))
    n, rank = dist.get_world_size(), dist.get_rank()
    tokens, labels = (x.tensor_split(n)[rank] for x in rows())
    assert isinstance(model, FSDPModule)
    losses = []
    for i in range(len(tokens)):
        model.set_requires_gradient_sync(i == len(tokens) - 1)
        objective = model(tokens[i : i + 1], SequenceInfo.whole(1, T, first_row=0), labels[i : i + 1])
        (objective.total / (4 * T)).backward()
        losses.append(objective.loss_sum / (4 * T))
    loss = torch.stack(losses).sum()
    dist.all_reduce(loss)
    grads = whole({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    computed = {m.weight.dtype for m in model.modules() if isinstance(m, nn.Linear)}
    return {"weights": weights, "loss": loss, "grads": grads, "computed": computed}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    model = bare_model()
    weights = whole(dict(model.named_parameters()))
    tokens, labels = rows()
    objective = model(tokens, SequenceInfo.whole(4, T), labels)
    (objective.total / (4 * T)).backward()
    return {"weights": weights, "loss": objective.loss_sum / (4 * T), "grads": whole({n: p.grad for n, p in model.named_parameters()})}


@pytest.mark.parametrize(("n_processes", "replicate", "checkpointing"), [(1, 1, "none"), (2, 1, "full"), (4, 1, "none"), (4, 2, "full")])
def test_processes_equal_one(expected: dict[str, Any], n_processes: int, replicate: int, checkpointing: str) -> None:
    for found in run_distributed(one_step, n_processes, replicate, checkpointing, "float32"):
        assert found["weights"].keys() == expected["weights"].keys()
        for name, value in expected["weights"].items():
            assert torch.equal(found["weights"][name], value), f"initial {name}"
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-6, atol=0)
        assert found["grads"].keys() == expected["grads"].keys()
        for name, value in expected["grads"].items():
            torch.testing.assert_close(found["grads"][name], value, rtol=1e-4, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_computes_near_fp32_from_the_same_masters(expected: dict[str, Any], dtype: str) -> None:
    for found in run_distributed(one_step, 2, 1, "none", dtype):
        for name, value in expected["weights"].items():
            assert torch.equal(found["weights"][name], value), f"initial {name}"
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=2e-2, atol=0)
        scale = torch.cat([g.flatten() for g in expected["grads"].values()]).square().mean().sqrt()
        for name, value in expected["grads"].items():
            error = (found["grads"][name] - value).abs().max() / torch.clamp(value.abs().max(), min=scale)
            assert error < 0.15, f"{name}: {error}"
