"""A seeded permutation of 0 .. n-1 that is never held in memory.

A Feistel network over the smallest power of two that holds n, walked along its cycles until the value falls below n
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). At most half of the domain lies above n,
so a value takes less than two walks on average.
"""

import hashlib

import numpy as np

N_ROUNDS = 8  # even, so that the two halves end with the widths they began with


class Permutation:
    """``permutation(index)`` is where ``index`` goes; every value below ``n`` is reached once.

    ``part`` numbers the permutations of one seed and epoch.
    """

    def __init__(self, n: int, *, seed: int, epoch: int, part: int = 0) -> None:
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._left_bits, self._right_bits = bits // 2, bits - bits // 2
        key = f"{seed}:{epoch}" if part == 0 else f"{seed}:{epoch}:part {part}"
        digests = [hashlib.sha256(f"{key}:{i}".encode()).digest() for i in range(N_ROUNDS)]
        self._keys = [np.uint64(int.from_bytes(digest[:8], "little")) for digest in digests]

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """``index`` int64 of any shape, each below n -> int64 of the same shape."""
        value = self._encrypt(index.astype(np.uint64))
        outside = value >= self.n
        while outside.any():
            value[outside] = self._encrypt(value[outside])
            outside = value >= self.n
        return value.astype(np.int64)

    def _encrypt(self, value: np.ndarray) -> np.ndarray:
        left_bits, right_bits = self._left_bits, self._right_bits
        left, right = value >> np.uint64(right_bits), value & _mask(right_bits)
        for key in self._keys:
            left, right = right, left ^ (_scramble(right, key) & _mask(left_bits))
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _scramble(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), on value + key; overflow wraps."""
    value = value + key
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
