"""The helper that starts processes for the distributed tests."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, run_distributed


def add_up(offset: float) -> torch.Tensor:
    total = torch.full((3,), float(dist.get_rank()))
    dist.all_reduce(total)
    return total + offset + dist.get_rank()


def fail(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("the reason")
        os._exit(3)
    dist.barrier()


def test_results_come_back_by_rank() -> None:
    results = run_distributed(add_up, 3, 10)
    assert [result.tolist() for result in results] == [[13.0] * 3, [14.0] * 3, [15.0] * 3]


@pytest.mark.parametrize(("how", "message"), [("raise", "rank 1 failed:(.|\n)*ValueError: the reason"), ("die", "rank 1 failed:\nit died")])
def test_a_failing_rank_is_shown(how: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=message):
        run_distributed(fail, 2, how)
    assert time.monotonic() - start < 60


def test_a_hanging_rank_is_ended() -> None:
    with pytest.raises(RankError, match=r"had not finished in time"):
        run_distributed(time.sleep, 1, 600, timeout_seconds=2)
