import numpy as np
import pytest

from titanarch.data.permutation import Permutation


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 65_537])
def test_every_value_once(n: int) -> None:
    values = Permutation(n, seed=5, epoch=1)(np.arange(n))
    assert sorted(values.tolist()) == list(range(n))


def test_part_by_part_is_the_whole() -> None:
    permutation = Permutation(1003, seed=1, epoch=0)
    parts = [permutation(np.arange(start, min(start + 17, 1003))) for start in range(0, 1003, 17)]
    np.testing.assert_array_equal(np.concatenate(parts), permutation(np.arange(1003)))


def test_values_beyond_32_bits() -> None:
    n = 3 * 10**12 + 1
    index = np.arange(n - 5000, n)
    values = Permutation(n, seed=1, epoch=0)(index)
    assert len(set(values.tolist())) == 5000
    assert values.min() >= 0
    assert values.max() < n


def test_seed_and_epoch_give_other_orders() -> None:
    index = np.arange(2000)
    orders = [Permutation(2000, seed=seed, epoch=epoch)(index) for seed in range(3) for epoch in range(3)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # two independent permutations agree at one place on average; 12 has probability below 1e-9
            assert (one == other).sum() < 12


@pytest.mark.parametrize("n", [12, 4000])
def test_order_looks_random(n: int) -> None:
    """Over many seeds, where an index goes is uniform over eight buckets, and neighbours go apart (chi-squared, z-test)."""
    n_seeds = 4000 if n < 100 else 40
    values = np.stack([Permutation(n, seed=seed, epoch=0)(np.arange(n)) for seed in range(n_seeds)])
    counts = np.stack([np.bincount(column, minlength=n) for column in values.T]) if n < 100 else None
    if counts is not None:
        expected = n_seeds / n
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        freedom = (n - 1) ** 2
        assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)
    else:
        ascents = (np.diff(values, axis=1) > 0).mean()
        assert abs(ascents - 0.5) < 5 * np.sqrt(1 / 12 / n / n_seeds)
        correlation = np.mean([np.corrcoef(np.arange(n), row)[0, 1] for row in values])
        assert abs(correlation) < 5 / np.sqrt(n * n_seeds)
