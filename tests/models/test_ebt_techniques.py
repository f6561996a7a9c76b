"""The energy-based transformer on several processes, and what its table and the check refuse."""

from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from tests.distributed import run_distributed
from tests.models.test_ebt import BASE, S2, T, V, batch, ebt, packed
from titanarch.config.errors import ConfigError
from titanarch.contract.init import qualified_names
from titanarch.contract.sequence import SequenceInfo
from titanarch.models.ebt.config import EBTConfig
from titanarch.models.ebt.model import EBT
from titanarch.parallel.apply import materialize, parallelize
from titanarch.parallel.check import decide_division, technique_problems
from titanarch.parallel.compile import apply_compile
from titanarch.parallel.config import ActivationCheckpointConfig, CompileConfig, Float8Config, ParallelismConfig
from titanarch.parallel.mesh import build_mesh, resolve_degrees


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"replay_buffer": True}, "not built: remove the key"),
        ({"mixer": {"window": 4}}, "mixer.window"),
        ({"mixer": {"position": "alibi"}}, "bias by distance"),
        ({"mixer": {"kind": "external", "module": "a:B"}}, "external"),
        ({"flavor": "llama3_8b"}, "no such flavor"),
        ({"n_heads": 3}, "not a multiple of n_heads"),
    ],
)
def test_what_is_refused_in_the_table(table: dict[str, Any], message: str) -> None:
    with pytest.raises((ValidationError, ConfigError), match=message):
        EBTConfig.model_validate({**BASE, **table})


def _divided() -> tuple[float, dict[str, Tensor]]:
    """The objective and gradients of four rows, two on each of the processes, summed over them."""
    config, layout = EBTConfig.model_validate({**BASE, **S2}), ParallelismConfig()
    with torch.device("meta"):
        model = EBT(config, V, T)
    names, degrees = qualified_names(model), resolve_degrees(layout, dist.get_world_size())
    parallelize(
        model,
        build_mesh(degrees, "cpu"),
        decide_division(model, layout, degrees, seq_len=T, device_type="cpu"),
        vocab_size=V,
        parallelism=layout,
        activation_checkpoint=ActivationCheckpointConfig(),
        compile_config=CompileConfig(),
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
    )
    materialize(model, names, config.init, seed=0, device=torch.device("cpu"))
    (tokens, labels), first = batch(4), 2 * dist.get_rank()
    rows, seq = slice(first, first + 2), SequenceInfo.whole(2, T, seed=3, first_row=first)
    found = model(tokens[rows], seq, labels[rows])
    found.total.backward()
    total = found.total.detach().clone()
    dist.all_reduce(total)
    return float(total), {name: p.grad.full_tensor() for name, p in model.named_parameters()}  # type: ignore[union-attr]


def test_two_processes_train_as_one() -> None:
    model, (tokens, labels) = ebt(S2, dtype=torch.float32), batch(4)
    alone = model(tokens, SequenceInfo.whole(4, T, seed=3), labels).total
    alone.backward()
    for total, gradients in run_distributed(_divided, 2):
        assert total == pytest.approx(float(alone.detach()), rel=1e-5)
        ours, theirs = (torch.cat([gradient[name].flatten() for name in gradients]) for gradient in (gradients, _gradients(model)))
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def _gradients(model: EBT) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_compiled_step_trains_as_an_eager_one() -> None:
    """The landscape with its inner gradient is one whole graph, whose backward has the second derivatives."""
    seq, models = packed((4, 1, 4), n_rows=2, seed=3), [ebt({"n_layers": 1}, dtype=torch.float32) for _ in range(2)]
    tokens, labels = batch()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    apply_compile(models[1], CompileConfig.model_validate({"enable": True, "backend": "aot_eager"}))
    totals = [model(tokens, seq, labels).total for model in models]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one of the block's contexts, one of the landscape"
    torch.testing.assert_close(*totals, rtol=1e-5, atol=0)
    for total in totals:
        total.backward()
    eager, compiled = (torch.cat([gradient.flatten() for gradient in _gradients(model).values()]) for model in models)
    assert (compiled - eager).norm() <= 1e-5 * eager.norm()
    torch._dynamo.reset()


def test_what_is_refused_of_techniques() -> None:
    with torch.device("meta"):
        model = EBT(EBTConfig.model_validate(BASE), V, T)
    for key in ("tensor_parallel_degree", "context_parallel_degree"):
        config = ParallelismConfig.model_validate({key: 2})
        with pytest.raises(ConfigError, match=r"differentiates its energy in its forward.*use 1"):
            decide_division(model, config, resolve_degrees(config, 2), seq_len=8, device_type="cpu")
    alone = ParallelismConfig()
    problems = technique_problems(
        model,
        activation_checkpoint=ActivationCheckpointConfig.model_validate({"mode": "full"}),
        compile_config=CompileConfig.model_validate({"enable": True}),
        float8=Float8Config.model_validate({"enable": True, "emulate": True}),
        parallelism=alone,
        degrees=resolve_degrees(alone, 1),
        seq_len=T,
        device_type="cpu",
    )
    assert [problem.key for problem in problems] == ["activation_checkpoint.mode", "quantize.linear.float8.enable"]
