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
from titanarch.contract.init import Init, qualified_names
from titanarch.contract.sequence import SequenceInfo
from titanarch.models.decoder import Decoder, DecoderConfig
from titanarch.parallel.apply import materialize, parallelize
from titanarch.parallel.check import decide_division
from titanarch.parallel.config import ActivationCheckpointConfig, CompileConfig, ParallelismConfig
from titanarch.parallel.mesh import build_mesh, resolve_degrees

V, T, SEED = 40, 12, 3
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


def sharded_model(parallelism: ParallelismConfig, checkpointing: str, dtype: torch.dtype) -> Decoder:
    config = DecoderConfig.model_validate(TABLE)
    with torch.device("meta"):
        model = Decoder(config, V, T)
    names = qualified_names(model)
    degrees = resolve_degrees(parallelism, dist.get_world_size())
    mesh = build_mesh(degrees, "cpu")
    parallelize(
        model,
        mesh,
        decide_division(model, parallelism, degrees, seq_len=T, device_type="cpu"),
        vocab_size=V,
        parallelism=parallelism,
        activation_checkpoint=ActivationCheckpointConfig.model_validate({"mode": checkpointing}),
        compile_config=CompileConfig(),
        param_dtype=dtype,
        reduce_dtype=torch.float32,
    )
    materialize(model, names, config.init, seed=SEED, device=torch.device("cpu"))
    return model


def rows() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(V, (4, T + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def plain_name(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def whole(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {plain_name(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in parameters.items()}


def one_step(replicate: int, checkpointing: str, dtype_name: str) -> dict[str, Any]:
    """Weights, loss and gradients of a step on this process's share of four rows, two micro-batches where it has two."""
    dtype = getattr(torch, dtype_name)
    model = sharded_model(ParallelismConfig(data_parallel_replicate_degree=replicate), checkpointing, dtype)
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
