"""Unigram and bigram baselines: what counting alone reaches on the same targets.

Interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1999, section 2.7, with one discount an order,
D = n1 / (n1 + 2 n2) from the numbers n1, n2 of events seen once and twice). With V token types:

- unigram: p(w) = max(c(w) - D, 0) / c(.) + D types / c(.) / V, c the counts of targets;
- continuation: q(w) the same formula on the numbers of different tokens seen before w;
- bigram: p(w | v) = max(c(v w) - D', 0) / c(v .) + D' types(v .) / c(v .) q(w); after an unseen v it is q(w).
"""

from collections.abc import Iterable

import numpy as np

from titanarch.data.batch import IGNORED, Batch


class Ngrams:
    """Counts of a training split, and the losses they give. Memory: 16 bytes a different pair of tokens."""

    def __init__(self, pair_codes: np.ndarray, vocab_size: int) -> None:
        """``pair_codes``: previous * vocab_size + target of every counted target, int64 [n], n at least 1."""
        self.vocab_size = vocab_size
        self.n_tokens = len(pair_codes)
        self._codes_P, counts_P = np.unique(pair_codes, return_counts=True)
        previous_P, target_P = np.divmod(self._codes_P, vocab_size)
        self.unigram_V = _interpolated(np.bincount(target_P, weights=counts_P, minlength=vocab_size))
        """Probability of each token, fp64."""
        self.continuation_V = _interpolated(np.bincount(target_P, minlength=vocab_size))
        """Probability of each token after a token never seen, fp64."""
        discount = _discount(counts_P)
        seen_V = np.bincount(previous_P, weights=counts_P, minlength=vocab_size)
        self._discounted_P = (counts_P - discount) / seen_V[previous_P]
        types_V = np.bincount(previous_P, minlength=vocab_size)
        self._backoff_V = np.divide(discount * types_V, seen_V, out=np.ones(vocab_size), where=seen_V > 0)

    def unigram_losses(self, target: np.ndarray) -> np.ndarray:
        """Nats of each target, fp64 of the shape of ``target``."""
        return -np.log(self.unigram_V)[target]

    def bigram_losses(self, previous: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Nats of each target after the token ``previous``, fp64 of their shape."""
        codes = previous.astype(np.int64) * self.vocab_size + target
        place = np.minimum(np.searchsorted(self._codes_P, codes), len(self._codes_P) - 1)
        discounted = np.where(self._codes_P[place] == codes, self._discounted_P[place], 0.0)
        return -np.log(discounted + self._backoff_V[previous] * self.continuation_V[target])


def count_ngrams(batches: Iterable[Batch], *, vocab_size: int, max_tokens: int) -> Ngrams | None:
    """Counts of the first ``max_tokens`` targets in ``batches``, of which each is predicted from the token before.

    A document's first token is no target. None where there is no target. Memory: 24 bytes a counted target.
    """
    parts, n = [], 0
    for batch in batches:
        valid = batch.labels_BT != IGNORED
        codes = batch.tokens_BT[valid] * vocab_size + batch.labels_BT[valid]
        parts.append(codes.numpy()[: max_tokens - n])
        n += len(parts[-1])
        if n == max_tokens:
            break
    return Ngrams(np.concatenate(parts), vocab_size) if n else None


def _discount(counts: np.ndarray) -> float:
    """D, or 1/2 where nothing was seen once, so that every event keeps a probability."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else 0.5


def _interpolated(counts_V: np.ndarray) -> np.ndarray:
    """Absolute discounting, what it takes spread over all tokens alike: fp64 [V]."""
    discount = _discount(counts_V)
    n_types, total = int((counts_V > 0).sum()), float(counts_V.sum())
    return (np.maximum(counts_V - discount, 0) + discount * n_types / len(counts_V)) / total
