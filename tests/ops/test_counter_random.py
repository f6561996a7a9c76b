"""Counter-based draws: their definition, their independence of the layout, and their statistics."""

import math

import pytest
import torch
from torch import Tensor

from titanarch.ops.counter_random import (
    column_words,
    dropout,
    keep_mask,
    normal,
    random_bits,
    reference_bits,
    token_keys,
    uniform_integers,
)

B, T, C = 16, 64, 96
SEEDS = [0, 1, -5, 2**62 + 12345]


def bits(seed: int = 3, site: int = 7, first_row: int = 0) -> Tensor:
    key_BT = token_keys(seed, torch.arange(first_row, first_row + B), torch.arange(T), site)
    return random_bits(key_BT, column_words(torch.arange(C)))


@pytest.mark.parametrize("seed", SEEDS)
def test_bits_equal_the_definition_in_python_integers(seed: int) -> None:
    row_B, index_T, channel_C = torch.tensor([0, 5, 2**40 + 3]), torch.tensor([0, 131_071]), torch.tensor([0, 9, 50_000])
    got = random_bits(token_keys(seed, row_B, index_T, 12), column_words(channel_C))
    for b, row in enumerate(row_B.tolist()):
        for t, index in enumerate(index_T.tolist()):
            for c, channel in enumerate(channel_C.tolist()):
                assert got[b, t, c].item() & 0xFFFFFFFF == reference_bits(seed, row, index, channel, 12)


def test_draws_do_not_depend_on_the_layout() -> None:
    x = torch.ones(B, T, C)
    whole = dropout(x, 0.4, seed=1, row_B=torch.arange(B), index_T=torch.arange(T), site=2)
    for rows in (slice(0, 5), slice(5, B)):
        for part in (torch.arange(0, T, 2), torch.arange(1, T, 2)):
            for channels in (slice(0, 31), slice(31, C)):
                piece = dropout(
                    x[rows][:, part, channels], 0.4, seed=1, row_B=torch.arange(B)[rows], index_T=part, site=2,
                    first_channel=channels.start,
                )  # fmt: skip
                assert torch.equal(piece, whole[rows][:, part, channels])
    heads = dropout(x.view(B, T, 8, 12), 0.4, seed=1, row_B=torch.arange(B), index_T=torch.arange(T), site=2)
    assert torch.equal(heads.flatten(2), whole)


def test_compiled_draws_are_the_same() -> None:
    x = torch.randn(4, 16, 24)

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        row_B, index_T = torch.arange(4) * 1000, torch.arange(16)
        return dropout(x, 0.3, seed=5, row_B=row_B, index_T=index_T, site=1), uniform_integers(5, row_B, 2, 1000)

    compiled = torch.compile(f, fullgraph=True, dynamic=False)
    for expected, got in zip(f(x), compiled(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_dropout_scales_what_it_keeps_and_its_gradient() -> None:
    x = torch.randn(B, T, C, dtype=torch.float64, requires_grad=True)
    arguments = {"seed": 9, "row_B": torch.arange(B), "index_T": torch.arange(T), "site": 0}
    y = dropout(x, 0.25, **arguments)  # type: ignore[arg-type]
    keep = keep_mask(0.25, n_channels=C, **arguments)  # type: ignore[arg-type]
    assert torch.equal(y, torch.where(keep, x / 0.75, 0.0)) or torch.allclose(y, torch.where(keep, x / 0.75, 0.0), rtol=1e-15)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, keep.double() / 0.75)
    assert dropout(x, 0.0, **arguments) is x  # type: ignore[arg-type]
    assert dropout(x.bfloat16(), 0.25, **arguments).dtype == torch.bfloat16  # type: ignore[arg-type]
    for p in (1.0, -0.1):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            dropout(x, p, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_keep_rates(p: float) -> None:
    """The whole, and every row, token and channel: within 4.5 standard deviations."""
    keep = keep_mask(p, seed=2, row_B=torch.arange(B), index_T=torch.arange(T), site=5, n_channels=C).double()
    for dims in ((), (1, 2), (0, 2), (0, 1)):
        means = keep.mean(dims) if dims else keep.mean()
        n = keep.numel() // means.numel()
        assert ((means - (1 - p)).abs() <= 4.5 * math.sqrt(p * (1 - p) / n)).all()


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("lag", [1, 2, 3, 8])
def test_neighbors_are_uncorrelated_along_every_axis(dim: int, lag: int) -> None:
    uniform = bits().double() / 2**31
    left, right = uniform.narrow(dim, 0, uniform.shape[dim] - lag), uniform.narrow(dim, lag, uniform.shape[dim] - lag)
    correlation = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1].item()
    assert abs(correlation) < 4.5 / math.sqrt(left.numel())


def test_seeds_and_sites_are_uncorrelated() -> None:
    draws = [bits(seed, site, row).flatten().double() for seed, site, row in ((3, 7, 0), (4, 7, 0), (3, 8, 0), (7, 3, 0), (3, 7, 100))]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 4.5 / math.sqrt(B * T * C)


def test_every_bit_is_fair_and_independent_of_the_others() -> None:
    ones = ((bits()[..., None] >> torch.arange(32)) & 1).flatten(0, 2).double()
    n = ones.shape[0]
    chi_square = ((ones.sum(0) - n / 2) ** 2 / (n / 4)).sum().item()
    assert abs(chi_square - 32) < 4.5 * math.sqrt(64)  # a chi-square of 32 degrees has variance 64
    correlation = torch.corrcoef(ones.T) - torch.eye(32)
    assert correlation.abs().max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("shift", [24, 16, 8, 0])
def test_bytes_are_uniform(shift: int) -> None:
    counts = torch.bincount(((bits() >> shift) & 0xFF).flatten(), minlength=256).double()
    expected = B * T * C / 256
    assert abs(((counts - expected) ** 2 / expected).sum().item() - 255) < 4.5 * math.sqrt(510)


def test_pairs_of_draws_are_uniform_on_the_square() -> None:
    """4-bit pairs of neighbors on each axis, and of the corners of a rectangle (their exclusive or): chi-square of 255 degrees."""
    top = (bits() >> 28) & 0xF
    pairs = [16 * top.narrow(d, 0, top.shape[d] - 1) + top.narrow(d, 1, top.shape[d] - 1) for d in range(3)]
    corner = top[:, :-1, :-1] ^ top[:, 1:, :-1] ^ top[:, :-1, 1:]
    pairs.append(16 * corner + top[:, 1:, 1:])
    for pair in pairs:
        counts = torch.bincount(pair.flatten(), minlength=256).double()
        expected = pair.numel() / 256
        assert abs(((counts - expected) ** 2 / expected).sum().item() - 255) < 4.5 * math.sqrt(510)


def test_uniform_integers() -> None:
    draws = uniform_integers(4, torch.arange(70_000), 1, 7)
    counts = torch.bincount(draws, minlength=7).double()
    assert len(counts) == 7
    assert ((counts - 10_000) ** 2 / 10_000).sum().item() < 6 + 4.5 * math.sqrt(12)
    assert torch.equal(uniform_integers(4, torch.tensor([5, 69_999]), 1, 7), draws[[5, 69_999]])
    assert uniform_integers(4, torch.arange(5), 1, 1).tolist() == [0] * 5
    big = uniform_integers(4, torch.arange(1000), 1, 2**31 - 1)
    assert big.min() >= 0
    assert big.max() < 2**31 - 1
    for high in (0, 2**31):
        with pytest.raises(ValueError, match="high must be"):
            uniform_integers(4, torch.arange(5), 1, high)


def test_normal_moments_and_layout() -> None:
    arguments = {"seed": 1, "row_B": torch.arange(B), "index_T": torch.arange(T), "site": 3}
    x = normal(n_channels=C, **arguments)  # type: ignore[arg-type]
    n = x.numel()
    for power, mean, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs((x.double() ** power).mean().item() - mean) < 4.5 * math.sqrt(variance / n)
    part = normal(n_channels=10, first_channel=50, **arguments)  # type: ignore[arg-type]
    assert torch.equal(part, x[..., 50:60])
    below = (x < 1.0).double().mean().item()
    assert abs(below - 0.841345) < 4.5 * math.sqrt(0.841345 * 0.158655 / n)
