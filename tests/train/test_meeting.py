"""The processes of a start agree on a name, whatever earlier starts have left in the store."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch._C._distributed_c10d import HashStore

from titanarch.train.meeting import PREFIX, agree


def names(store: HashStore, world_size: int, late: dict[int, float]) -> set[str]:
    """What each process of a start finds; those in ``late`` come after so many seconds."""

    def process(rank: int) -> str:
        time.sleep(late.get(rank, 0.0))
        return agree(store, rank, world_size, seconds=20)

    with ThreadPoolExecutor(world_size) as pool:
        return set(pool.map(process, range(world_size)))


def test_all_find_one_name_and_each_start_another() -> None:
    store, found = HashStore(), []
    for late in ({}, {0: 0.3}, {3: 0.3}, {1: 0.2, 2: 0.4}):
        (name,) = names(store, 4, late)
        found.append(name)
    assert len(set(found)) == 4


def test_a_start_that_broke_off_does_no_harm() -> None:
    """Numbers of processes that are gone lie there, and lists with and without process 0."""
    store = HashStore()
    for rank in (0, 2):
        with pytest.raises(TimeoutError):
            agree(store, rank, 3, seconds=0.1)
    assert store.check([f"{PREFIX}/0"])
    assert len(names(store, 3, {1: 0.3})) == 1
    assert len(names(store, 2, {1: 0.2})) == 1, "fewer than before"


def test_waiting_has_an_end() -> None:
    with pytest.raises(TimeoutError, match=r"process 0 of 2 waited 0 s for the others to start"):
        agree(HashStore(), 0, 2, seconds=0.05)
