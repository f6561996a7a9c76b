"""Which targets are scored, against loops that say the rules in another way."""

import random

import numpy as np
import pytest

from titanarch.evaluate.windows import ScoredWindows, blocks_of, same_target_windows, spread, whole_windows


def scored(windows: ScoredWindows) -> list[tuple[int, int, int]]:
    """(document, target, tokens before it that the model sees) of every scored target."""
    found = []
    for document, end, n in zip(windows.document_W.tolist(), windows.end_W.tolist(), windows.n_scored_W.tolist(), strict=True):
        found += [(document, target, target - (end - windows.length)) for target in range(end - n + 1, end + 1)]
    return found


def lengths(seed: int, longest: int) -> np.ndarray:
    draw = random.Random(seed)
    return np.array([draw.choice([0, 1, draw.randint(1, longest)]) for _ in range(12)] + [longest])


@pytest.mark.parametrize("length", [1, 2, 7, 16, 50])
def test_whole_windows_cut_each_document_from_its_start(length: int) -> None:
    lengths_N = lengths(1, 120)
    expected = []
    for document, n in enumerate(lengths_N.tolist()):
        start = 0
        while start + length < n:  # the last target of the window is in the document
            expected += [(document, target, target - start) for target in range(start + 1, start + length + 1)]
            start += length
    assert scored(whole_windows(lengths_N, length, 0)) == expected


def test_whole_windows_are_spread_when_there_are_too_many() -> None:
    whole, some = whole_windows(np.array([1000, 3, 1000]), 10, 0), whole_windows(np.array([1000, 3, 1000]), 10, 45)
    assert len(whole) == 198
    assert len(some) == 4  # of 10 targets each: at most 45
    assert set(scored(some)) < set(scored(whole))
    assert np.bincount(some.document_W).tolist() == [2, 0, 2]
    assert len(whole_windows(np.array([1000]), 100, 7)) == 1  # less than a window would be nothing


def test_spread() -> None:
    assert spread(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread(3, 5).tolist() == [0, 1, 2]
    assert spread(0, 5).tolist() == []


@pytest.mark.parametrize("longest", [1, 2, 5, 8, 9, 31, 64])
@pytest.mark.parametrize("max_tokens", [0, 40])
def test_every_length_scores_the_same_targets(longest: int, max_tokens: int) -> None:
    lengths_N = lengths(longest, 200)
    reference = {(document, target) for document, target, _ in scored(same_target_windows(lengths_N, longest, longest, max_tokens))}
    assert reference
    for length in range(1, longest + 1):
        windows = same_target_windows(lengths_N, length, longest, max_tokens)
        found = scored(windows)
        assert len(found) == len(reference)  # none twice
        assert {(document, target) for document, target, _ in found} == reference
        assert all(length / 2 < context <= length for _, _, context in found)
        assert (windows.end_W - length >= 0).all()
        assert (windows.end_W < lengths_N[windows.document_W]).all()
        assert windows.scored_WR.sum() == len(reference)


@pytest.mark.parametrize("longest", [2, 5, 8, 31])
def test_the_targets_are_all_whole_blocks_with_room_for_the_longest_context(longest: int) -> None:
    lengths_N = lengths(3, 150)
    block = (longest + 1) // 2
    expected = set()
    for document, n in enumerate(lengths_N.tolist()):
        first = block + 1
        while first + block <= n:
            expected |= {(document, target) for target in range(first, first + block)}
            first += block
    assert {(d, t) for d, t, _ in scored(same_target_windows(lengths_N, longest, longest, 0))} == expected
    assert int(blocks_of(lengths_N, longest).sum()) * block == len(expected)


def test_a_bound_on_the_targets_holds() -> None:
    windows = same_target_windows(np.array([5000, 900]), 64, 256, 1000)
    assert windows.n_scored_W.sum() == 7 * 128  # whole blocks of 128, at most 1000 targets
