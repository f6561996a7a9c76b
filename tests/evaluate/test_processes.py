"""Two processes under FSDP2 measure what one process does."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from tests.distributed import run_distributed
from tests.evaluate.common import CPU, TinyModel, data_of, run, texts
from titanarch.data.fixed import fixed_batches
from titanarch.data.tokenizers import build_tokenizer
from titanarch.evaluate.config import EvaluationConfig
from titanarch.evaluate.validation import validation_loss

LENGTHS = [8, 33, 100]


def summed(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x


def measure(folder: str, rank: int, degree: int) -> tuple[dict[str, Any], tuple[float, int]]:
    """The evaluation and the validation loss of one process; sharded where there are several."""
    # 3 windows of 100 tokens and few of the others: the processes' shares are unequal, and one has nothing at times
    own = Path(folder) / f"rank{rank}of{degree}"
    own.mkdir()
    data = data_of(own, texts(8, seed=1, longest=90), [*texts(3, seed=2, longest=60), "naïve " * 60])
    model = TinyModel(257)
    reduce = summed if degree > 1 else lambda x: x
    if degree > 1:
        mesh = init_device_mesh("cpu", (degree,))
        for block in model.blocks():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "token_losses")
    config = EvaluationConfig.model_validate({"lengths": LENGTHS, "max_tokens": 0, "batch_tokens": 70})
    result = run(model, config, data, rank=rank, degree=degree, reduce=reduce)
    batches = fixed_batches(
        data,
        "validation",
        tokenizer=build_tokenizer(data.tokenizer),
        seq_len=16,
        n_rows=5,
        batch_size=2,
        dp_rank=rank,
        dp_degree=degree,
    )
    return result.to_json(), tuple(validation_loss(model, batches, device=CPU, reduce=reduce))


def measure_rank(folder: str) -> tuple[dict[str, Any], tuple[float, int]]:
    return measure(folder, dist.get_rank(), dist.get_world_size())


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    expected, (loss, n_targets) = measure(str(tmp_path), 0, 1)
    first, second = run_distributed(measure_rank, 2, str(tmp_path))
    assert first == second
    found, (found_loss, found_targets) = first
    assert found_targets == n_targets
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert list(found) == list(expected)
    for name, rows in expected.items():
        if name == "data_fingerprint":
            assert found[name] == rows
            continue
        for row, ours in zip(rows, found[name], strict=True):
            assert list(row) == list(ours)
            for key, value in row.items():
                close = isinstance(value, float) and math.isclose(value, ours[key], rel_tol=1e-5, abs_tol=1e-6)
                assert close or value == ours[key], (name, key)
