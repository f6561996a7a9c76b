"""Counter-based random draws: every number is a function of where it is used, not of what was drawn before.

A draw depends on (seed, site, global row, index of the token in its row, channel) alone, so any split of a batch over
processes, of a row over context parallelism or of channels and heads over tensor parallelism draws the same numbers.
All of it is tensor arithmetic on integers, alike on CPU and GPU, and compiles without a graph break (a ``torch.Generator``
does not).

- A key is 63 bits in two lanes. A coordinate (row, then token, then perhaps a head) is mixed into each lane by two rounds of
  a folded product, ``x = p ^ (p >> 32)`` with ``p = (x ^ word) * odd`` (the step of W. Yi's wyhash, public domain).
- A key (hi, lo) gives column c the bits ``finalize(lo + (2 hi + 1) h(c))``, with the finalizer of A. Appleby's MurmurHash3
  (public domain) and a bijection h of the same form: a 2-universal hash in front of an avalanche, about eight cheap passes.

Keys are computed in int64 without ever overflowing: a compiler may assume that signed numbers do not overflow, and where
TorchInductor knows a coordinate's range (an ``arange``), it and the C++ compiler act on that. The last step multiplies
int32 numbers of unknown range, which wrap around.

Shapes: B rows, T tokens, C channels. A site is an integer that names the place of the draw, such as ``16 * layer + 3``; two
places that share a seed and a site draw the same numbers.
"""

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF  # the low 32 bits
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0x7FEB352D, 0x735A2D97  # below 2**31: a product with 32 bits stays below 2**63
_HIGH_LANE, _LOW_LANE = (0x7C2B9E3B, 0x735A2D97), (0x6C8E9CF5, 0x5851F42D)
_FLIP = 0x2545F491  # so that coordinate 0 is not a fixed point


def _seed_lanes(seed: int, site: int) -> tuple[int, int]:
    """The lanes (hi, lo) of a seed and a site, by SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    word = 0
    for part in (seed, site):
        word = (word + part * 0xD1B54A32D192ED03 + _GOLDEN) & ((1 << 64) - 1)
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & ((1 << 64) - 1)
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB & ((1 << 64) - 1)
        word ^= word >> 31
    return word >> 33, word & _WORD


def _folded(lane: Tensor, odds: tuple[int, int]) -> Tensor:
    """A hash of 0 .. 2**32 - 1, int64."""
    for odd in odds:
        product = (lane ^ _FLIP) * odd
        lane = (product ^ (product >> 32)) & _WORD
    return lane


def _extended(high: Tensor | int, low: Tensor | int, word: Tensor) -> Tensor:
    """Keys of a coordinate below 2**63, its upper half in the high lane too."""
    word = word.to(torch.int64)
    word_low = word & _WORD
    high = _folded(word_low ^ ((word >> 31) & (_WORD - 1)) ^ high, _HIGH_LANE) & 0x7FFFFFFF
    key = (high << 32) | _folded(word_low ^ low, _LOW_LANE)
    # A view of itself makes TorchInductor store the keys. It would repeat their computation wherever they are used twice,
    # which is at every xorshift that follows: compiling took minutes.
    return key.as_strided(key.shape, key.stride())


def row_keys(seed: int, row_B: Tensor, site: int) -> Tensor:
    """Keys [B] int64 of the global rows ``row_B`` (int64) at a site."""
    return _extended(*_seed_lanes(seed, site), row_B)


def extend_keys(key: Tensor, word: Tensor) -> Tensor:
    """Keys of one more coordinate: ``key`` and ``word`` (integers) broadcast against each other. int64."""
    return _extended(key >> 32, key & _WORD, word)


def token_keys(seed: int, row_B: Tensor, index_T: Tensor, site: int) -> Tensor:
    """Keys [B, T] int64 of tokens. ``index_T``: index of each token in its global row, [T] or [B, T]."""
    return extend_keys(row_keys(seed, row_B, site)[:, None], index_T)


def _int32(word: Tensor) -> Tensor:
    """0 .. 2**32 - 1 as int32 with the same bits. The range is made signed first: a cast out of range is undefined."""
    return ((word ^ (1 << 31)) - (1 << 31)).to(torch.int32)


def column_words(columns: Tensor) -> Tensor:
    """The words, int32, by which :func:`random_bits` tells columns (integers below 2**32) apart: no two are alike."""
    word = (columns.to(torch.int64) & _WORD) ^ _FLIP
    word = ((word ^ (word >> 16)) * _FIRST) & _WORD
    word = ((word ^ (word >> 15)) * _SECOND) & _WORD
    return _int32(word ^ (word >> 16))


def random_bits(key: Tensor, word_C: Tensor) -> Tensor:
    """int32 [*key.shape, C], 32 random bits an element, from int64 keys and :func:`column_words`."""
    add, multiply = _int32(key & _WORD)[..., None], _int32((key >> 32) * 2 + 1)[..., None]
    bits = torch.addcmul(add, multiply, word_C)
    bits = bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(0x85EBCA6B - (1 << 32))
    bits = bits.bitwise_xor_((bits >> 13).bitwise_and_(0x7FFFF)).mul_(0xC2B2AE35 - (1 << 32))
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def reference_bits(seed: int, row: int, index: int, channel: int, site: int) -> int:
    """What :func:`random_bits` gives for one element, in Python integers: the definition, as an unsigned 32-bit integer."""
    high, low = _seed_lanes(seed, site)
    for word in (row, index):
        high ^= (word & _WORD) ^ ((word >> 31) & (_WORD - 1))
        low ^= word & _WORD
        for odd_high, odd_low in zip(_HIGH_LANE, _LOW_LANE, strict=True):
            high, low = (high ^ _FLIP) * odd_high, (low ^ _FLIP) * odd_low
            high, low = (high ^ (high >> 32)) & _WORD, (low ^ (low >> 32)) & _WORD
        high &= 0x7FFFFFFF
    word = channel ^ _FLIP
    word = ((word ^ (word >> 16)) * _FIRST) & _WORD
    word = ((word ^ (word >> 15)) * _SECOND) & _WORD
    bits = (low + (2 * high + 1) * (word ^ (word >> 16))) & _WORD
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B & _WORD
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35 & _WORD
    return bits ^ (bits >> 16)


def keep_from_bits(bits: Tensor, p: float) -> Tensor:
    """bool, True with probability 1 - p (to 2**-32). Raises ValueError unless 0 <= p < 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"a dropout probability must be at least 0 and below 1, got {p}")
    return bits >= min(round(p * 2.0**32), _WORD) - (1 << 31)


def _channel_words(n_channels: int, first_channel: int, device: torch.device) -> Tensor:
    return column_words(torch.arange(first_channel, first_channel + n_channels, device=device))


def keep_mask(p: float, *, seed: int, row_B: Tensor, index_T: Tensor, site: int, n_channels: int, first_channel: int = 0) -> Tensor:
    """bool [B, T, C]: which elements dropout keeps. ``first_channel`` is the global number of the first of the C channels."""
    key_BT = token_keys(seed, row_B, index_T, site)
    return keep_from_bits(random_bits(key_BT, _channel_words(n_channels, first_channel, key_BT.device)), p)


def dropout(x_BTD: Tensor, p: float, *, seed: int, row_B: Tensor, index_T: Tensor, site: int, first_channel: int = 0) -> Tensor:
    """``x * keep / (1 - p)``, as :func:`torch.nn.functional.dropout` but keyed. Shape and dtype of x.

    ``x_BTD`` is [B, T, ...]; its further dims are numbered as one. The bool mask is kept for the backward: a byte an
    element is cheaper than drawing again. Raises ValueError unless 0 <= p < 1.
    """
    if p == 0.0:
        return x_BTD
    n_channels = math.prod(x_BTD.shape[2:])
    keep = keep_mask(p, seed=seed, row_B=row_B, index_T=index_T, site=site, n_channels=n_channels, first_channel=first_channel)
    return (x_BTD * keep.view(x_BTD.shape)) * (1.0 / (1.0 - p))


def uniform_integers(seed: int, row_B: Tensor, site: int, high: int) -> Tensor:
    """int64 [B], uniform over 0 .. high - 1 (bias below high / 2**32). Raises ValueError unless 1 <= high < 2**31."""
    if not 1 <= high < 1 << 31:
        raise ValueError(f"high must be from 1 to 2**31 - 1, got {high}")
    return ((row_keys(seed, row_B, site) & _WORD) * high) >> 32


def uniform(*, seed: int, row_B: Tensor, index_T: Tensor, site: int, n_channels: int, first_channel: int = 0) -> Tensor:
    """float32 [B, T, C], uniform over (0, 1], 24 bits."""
    key_BT = token_keys(seed, row_B, index_T, site)
    return _unit_interval(random_bits(key_BT, _channel_words(n_channels, first_channel, key_BT.device)))


def normal(*, seed: int, row_B: Tensor, index_T: Tensor, site: int, n_channels: int, first_channel: int = 0) -> Tensor:
    """float32 [B, T, C], standard normal by Box and Muller: ``sqrt(-2 ln u) cos(2 pi v)``, |x| < 5.9.

    The integers behind it are the same on every device; log and cos may differ in the last bit.
    """
    key_BT = token_keys(seed, row_B, index_T, site)
    words = _channel_words(2 * n_channels, 2 * first_channel, key_BT.device)
    radius, angle = (_unit_interval(random_bits(key_BT, words[i::2])) for i in (0, 1))
    return torch.sqrt(-2.0 * torch.log(radius)) * torch.cos((2.0 * math.pi) * angle)


def _unit_interval(bits: Tensor) -> Tensor:
    """The upper 24 of 32 random bits as float32 in (0, 1]."""
    # Two additions: 2**23 + 0.5 has no float32, and u = 0 would give infinity.
    return ((bits >> 8).to(torch.float32).add_(2.0**23).add_(0.5)) * 2.0**-24
