"""Seeds, the deterministic mode, garbage collection."""

import gc
import os
import random
import weakref
from collections.abc import Iterator

import numpy
import pytest
import torch
from pydantic import ValidationError

from titanarch.config.errors import ConfigError
from titanarch.train.reproducibility import (
    CUBLAS_VARIABLE,
    DebugConfig,
    GarbageCollection,
    resolve_seed,
    seed_global_generators,
    set_deterministic,
)


def test_seed_is_identity_and_the_mode_is_not() -> None:
    assert DebugConfig.is_identity("seed")
    assert not DebugConfig.is_identity("deterministic")
    with pytest.raises(ValidationError):
        DebugConfig(seed=-1)


def test_resolve_seed() -> None:
    cpu = torch.device("cpu")
    assert resolve_seed(0, cpu) == 0
    drawn = {resolve_seed(None, cpu) for _ in range(4)}
    assert len(drawn) > 1
    assert all(DebugConfig(seed=seed).seed == seed for seed in drawn)


def test_global_generators_repeat() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.random()), float(torch.rand(()))  # noqa: NPY002

    seed_global_generators(2**62 + 5)
    first = draws()
    assert draws() != first
    seed_global_generators(2**62 + 5)
    assert draws() == first


@pytest.fixture
def _usual_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.usefixtures("_usual_mode")
def test_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    set_deterministic(True, "cpu")
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert CUBLAS_VARIABLE not in os.environ
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    set_deterministic(False, "cpu")
    assert not torch.are_deterministic_algorithms_enabled()

    monkeypatch.setenv(CUBLAS_VARIABLE, ":0:0")
    with pytest.raises(ConfigError, match=r"\[debug\] deterministic: .*':0:0'.*:4096:8 or :16:8"):
        set_deterministic(True, "cuda")
    monkeypatch.delenv(CUBLAS_VARIABLE)
    set_deterministic(True, "cuda")
    assert os.environ[CUBLAS_VARIABLE] == ":4096:8"


class Node:
    """Part of a cycle, which only the collector frees."""

    def __init__(self) -> None:
        self.me = self


def test_garbage_is_collected_every_n_steps() -> None:
    freed = []
    with GarbageCollection(every_n_steps=3) as collection:
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        reference = weakref.ref(Node())
        for step in range(1, 5):
            collection.after_step(step)
            freed.append(reference() is None)
    assert freed == [False, False, True, True]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
