"""The baselines against interpolated Kneser-Ney written with dictionaries, straight from its definition."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from tests.evaluate.common import two_rows
from titanarch.data.batch import Batch, filler
from titanarch.evaluate.ngram import Ngrams, count_ngrams


class NaiveKneserNey:
    """Interpolated Kneser-Ney bigrams of (previous, target) pairs over ``vocab`` token types."""

    def __init__(self, pairs: list[tuple[int, int]], vocab: int) -> None:
        self.vocab = vocab
        self.pairs = Counter(pairs)
        self.followers: dict[int, set[int]] = defaultdict(set)
        self.preceders: dict[int, set[int]] = defaultdict(set)
        self.history: Counter[int] = Counter()
        for previous, target in pairs:
            self.followers[previous].add(target)
            self.preceders[target].add(previous)
            self.history[previous] += 1
        self.discount = self._discount(self.pairs.values())

    @staticmethod
    def _discount(counts: object) -> float:
        frequencies = Counter(counts)  # type: ignore[call-overload]
        return frequencies[1] / (frequencies[1] + 2 * frequencies[2]) if frequencies[1] else 0.5

    def lower(self, counts: dict[int, int], token: int) -> float:
        discount, total = self._discount(counts.values()), sum(counts.values())
        return max(counts.get(token, 0) - discount, 0) / total + discount * len(counts) / total / self.vocab

    def unigram(self, token: int) -> float:
        return self.lower(Counter(target for pair, n in self.pairs.items() for target in [pair[1]] * n), token)

    def bigram(self, previous: int, token: int) -> float:
        continuation = self.lower({target: len(before) for target, before in self.preceders.items()}, token)
        if previous not in self.history:
            return continuation
        seen = self.history[previous]
        weight = self.discount * len(self.followers[previous]) / seen
        return max(self.pairs[previous, token] - self.discount, 0) / seen + weight * continuation


def random_pairs(seed: int, n: int, vocab: int) -> list[tuple[int, int]]:
    """Skewed, so that there are unseen tokens, singletons and frequent pairs."""
    draw = np.random.default_rng(seed)
    return [(int(a), int(b)) for a, b in np.minimum(draw.geometric(0.3, size=(n, 2)) - 1, vocab - 3)]


def ngrams_of(pairs: list[tuple[int, int]], vocab: int) -> Ngrams:
    return Ngrams(np.array([previous * vocab + target for previous, target in pairs]), vocab)


@pytest.mark.parametrize(("n", "seed"), [(400, 0), (30, 1), (1, 2)])
def test_equals_the_definition(n: int, seed: int) -> None:
    vocab = 20
    pairs = random_pairs(seed, n, vocab)
    naive, ours = NaiveKneserNey(pairs, vocab), ngrams_of(pairs, vocab)
    previous, target = (axis.ravel() for axis in np.meshgrid(np.arange(vocab), np.arange(vocab)))
    expected = [-math.log(naive.bigram(v, w)) for v, w in zip(previous.tolist(), target.tolist(), strict=True)]
    np.testing.assert_allclose(ours.bigram_losses(previous, target), expected, rtol=1e-12)
    np.testing.assert_allclose(ours.unigram_losses(np.arange(vocab)), [-math.log(naive.unigram(w)) for w in range(vocab)], rtol=1e-12)


@pytest.mark.parametrize("pairs", [random_pairs(4, 300, 20), [(0, 1)] * 3, [(0, 1), (2, 3)]], ids=["many", "one kind", "singletons"])
def test_probabilities_sum_to_one_after_every_token(pairs: list[tuple[int, int]]) -> None:
    ours = ngrams_of(pairs, 20)
    token = np.arange(20)
    for previous in token:
        assert np.exp(-ours.bigram_losses(np.full(20, previous), token)).sum() == pytest.approx(1, abs=1e-12)
    assert np.exp(-ours.unigram_losses(token)).sum() == pytest.approx(1, abs=1e-12)
    assert np.isfinite(ours.bigram_losses(*np.meshgrid(token, token))).all()


def batches() -> list[Batch]:
    return [two_rows(), filler(2, 4)]


def test_counts_pairs_inside_documents_alone() -> None:
    counted = count_ngrams(batches(), vocab_size=10, max_tokens=100)
    assert counted is not None
    expected = ngrams_of([(5, 6), (6, 7), (7, 8), (8, 9), (1, 2), (3, 4), (4, 1)], 10)
    everything = np.meshgrid(np.arange(10), np.arange(10))
    assert counted.n_tokens == 7
    np.testing.assert_array_equal(counted.bigram_losses(*everything), expected.bigram_losses(*everything))


def test_counts_no_more_than_asked() -> None:
    counted = count_ngrams(batches(), vocab_size=10, max_tokens=2)
    assert counted is not None
    assert counted.n_tokens == 2
    np.testing.assert_array_equal(counted.unigram_V, ngrams_of([(5, 6), (6, 7)], 10).unigram_V)


def test_no_target_gives_no_counts() -> None:
    assert count_ngrams([filler(2, 4)], vocab_size=10, max_tokens=10) is None
