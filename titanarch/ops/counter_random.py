"""Counter-based random draws: every number is a function of where it is used, not of what was drawn before.

A draw depends on (seed, site, global row, index of the token in its row, channel) alone, so any split of a batch over
processes, of a row over context parallelism or of channels and heads over tensor parallelism draws the same numbers.
All of it is tensor arithmetic on integers, which wraps around alike on CPU and GPU and compiles without a graph break
(a ``torch.Generator`` does not).

- A key is 64 bits: ``key = mix(key + (word ^ flip) * odd)`` for each word in turn (seed and site, row, token), where ``mix`` is the
  finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
- A key with halves (a, b) gives column c the bits ``finalize(a + (b | 1) * word_c)`` with ``word_c = mix(c)`` and the
  32-bit finalizer of MurmurHash3 (Appleby, public domain): a 2-universal hash in front of an avalanche, 8 cheap passes.

Shapes: B rows, T tokens, C channels. A site is an integer that names the place of the draw, such as ``16 * layer + 3``; two
places that share a seed and a site draw the same numbers.
"""

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_ROW = 0xD1B54A32D192ED03
_TOKEN = 0xAEF17502108EF2D9
_COLUMN = 0xF1357AEA2E62A9C5
_LOW_HALF = 0xFFFFFFFF
_FLIP = 0x2545F4914F6CDD1D
"""Is exclusive-ored to a coordinate before it is multiplied: no coordinate is then 0, and TorchInductor, which computes
sums and products of an ``arange`` as unbounded integers, has to leave int64 arithmetic as it is."""


def _signed(word: int, bits: int = 64) -> int:
    """The integer that a signed word of ``bits`` bits holds for ``word`` modulo 2**bits."""
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


def _mix_int(word: int) -> int:
    """SplitMix64's finalizer on a Python integer; the same function as :func:`_mix`."""
    word &= (1 << 64) - 1
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & ((1 << 64) - 1)
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & ((1 << 64) - 1)
    return word ^ (word >> 31)


def _mix(word: Tensor) -> Tensor:
    """SplitMix64's finalizer, a bijection of 64 bits, on int64. Shifts are arithmetic in torch, so the sign is masked off."""
    word = (word ^ ((word >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ ((word >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return word ^ ((word >> 31) & ((1 << 33) - 1))


def _int32(word: Tensor) -> Tensor:
    """The low half of int64 words as int32, the same bits. The range is made signed first: a cast out of range is undefined."""
    return (((word & _LOW_HALF) ^ (1 << 31)) - (1 << 31)).to(torch.int32)


def row_keys(seed: int, row_B: Tensor, site: int) -> Tensor:
    """Keys [B] int64 of the global rows ``row_B`` (int64) at a site."""
    start = _mix_int(_mix_int(seed + _GOLDEN) + site * _GOLDEN)
    return _mix((row_B.to(torch.int64) ^ _FLIP) * _signed(_ROW) + _signed(start))


def extend_keys(key: Tensor, word: Tensor) -> Tensor:
    """Keys of one more coordinate: ``key`` and ``word`` (integers) broadcast against each other. int64."""
    return _mix(key + (word.to(torch.int64) ^ _FLIP) * _signed(_TOKEN))


def token_keys(seed: int, row_B: Tensor, index_T: Tensor, site: int) -> Tensor:
    """Keys [B, T] int64 of tokens. ``index_T``: index of each token in its global row, [T] or [B, T]."""
    return extend_keys(row_keys(seed, row_B, site)[:, None], index_T)


def column_words(columns: Tensor) -> Tensor:
    """The words, int32, by which :func:`random_bits` tells columns (integers) apart."""
    return _int32(_mix((columns.to(torch.int64) ^ _FLIP) * _signed(_COLUMN)))


def random_bits(key: Tensor, word_C: Tensor) -> Tensor:
    """int32 [*key.shape, C], 32 random bits an element, from int64 keys and :func:`column_words`."""
    add, multiply = _int32(key)[..., None], _int32((key >> 32) | 1)[..., None]
    bits = torch.addcmul(add, multiply, word_C)
    bits = bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(_signed(0x85EBCA6B, 32))
    bits = bits.bitwise_xor_((bits >> 13).bitwise_and_(0x7FFFF)).mul_(_signed(0xC2B2AE35, 32))
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def reference_bits(seed: int, row: int, index: int, channel: int, site: int) -> int:
    """What :func:`random_bits` gives for one element, in Python integers: the definition, as an unsigned 32-bit integer."""
    key = _mix_int((row ^ _FLIP) * _ROW + _mix_int(_mix_int(seed + _GOLDEN) + site * _GOLDEN))
    key = _mix_int(key + (index ^ _FLIP) * _TOKEN)
    word = _mix_int((channel ^ _FLIP) * _COLUMN) & _LOW_HALF
    bits = ((key & _LOW_HALF) + ((key >> 32) | 1) * word) & _LOW_HALF
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B & _LOW_HALF
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35 & _LOW_HALF
    return bits ^ (bits >> 16)


def keep_from_bits(bits: Tensor, p: float) -> Tensor:
    """bool, True with probability 1 - p (to 2**-32). Raises ValueError unless 0 <= p < 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"a dropout probability must be at least 0 and below 1, got {p}")
    return bits >= min(round(p * 2.0**32), _LOW_HALF) - (1 << 31)


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
    return (((row_keys(seed, row_B, site) >> 32) & _LOW_HALF) * high) >> 32


def normal(*, seed: int, row_B: Tensor, index_T: Tensor, site: int, n_channels: int, first_channel: int = 0) -> Tensor:
    """float32 [B, T, C], standard normal by Box and Muller: ``sqrt(-2 ln u) cos(2 pi v)``, |x| < 5.9.

    The integers behind it are the same on every device; log and cos may differ in the last bit.
    """
    key_BT = token_keys(seed, row_B, index_T, site)
    words = _channel_words(2 * n_channels, 2 * first_channel, key_BT.device)
    radius, angle = (
        # Two additions: 2**23 + 0.5 has no float32, and u = 0 would give infinity.
        ((random_bits(key_BT, words[i::2]) >> 8).to(torch.float32).add_(2.0**23).add_(0.5)) * 2.0**-24
        for i in (0, 1)
    )
    return torch.sqrt(-2.0 * torch.log(radius)) * torch.cos((2.0 * math.pi) * angle)
