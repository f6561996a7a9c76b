"""What the chunked recurrences of decay_recurrence.py share: cutting rows into chunks, documents in them, states between them.

Shapes: B rows, T tokens, N chunks, Q tokens a chunk, H heads, K key dim, V value dim.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_LOOP = 16
"""Chunks whose states are computed one after the other; of more, groups of so many are computed at once."""


class Documents(NamedTuple):
    """What of a chunk belongs together, bool. ``visible_BNQQ``: whether token t (rows) reads token s (columns).

    ``from_before_BNQ``: whether a token continues a document that began before the chunk. ``to_end_BNQ``: whether its document goes on
    to the chunk's last token.
    """

    visible_BNQQ: Tensor
    from_before_BNQ: Tensor
    to_end_BNQ: Tensor


def length_of_chunks(n_tokens: int, chunk_size: int) -> int:
    """Tokens a chunk: a power of two, at most ``chunk_size``, no longer than needed for the row."""
    assert min(chunk_size, n_tokens) >= 1, f"chunks of {chunk_size} tokens in rows of {n_tokens}"
    length = 1 << (chunk_size.bit_length() - 1)
    return min(length, 1 << (n_tokens - 1).bit_length())


def chunked(x: Tensor, length: int, value: float = 0) -> Tensor:
    """[B, T, ...] to [B, N, Q, ...]; the last chunk is filled up with ``value``."""
    missing = -x.shape[1] % length
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing), value=value)
    return x.unflatten(1, (-1, length))


def documents(starts_BT: Tensor | None, shape: tuple[int, int], length: int, device: torch.device) -> Documents:
    """``starts_BT``: whether a token is the first of its document, bool; None where no document starts after a row's first token.

    ``shape``: (B, N).
    """
    causal_QQ = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if starts_BT is None:
        every = torch.ones(1, 1, length, dtype=torch.bool, device=device)
        return Documents(causal_QQ.expand(1, 1, length, length), every, every)
    n_BNQ = chunked(starts_BT.to(torch.int32), length).cumsum(2)
    assert n_BNQ.shape[:2] == shape, f"starts_BT of {tuple(starts_BT.shape)} for {shape} chunks"
    return Documents(causal_QQ & (n_BNQ[..., :, None] == n_BNQ[..., None, :]), n_BNQ == 0, n_BNQ == n_BNQ[..., -1:])


def states_between(added_BN: Tensor, decay_BN: Tensor, state_B: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk, [B, N, ...], and after the last, [B, ...].

    ``added``: what each chunk leaves from the zero state, [B, N, ...]. ``decay``: what it leaves of the state before it, broadcasting
    against ``added``. ``state``: before the first chunk. Linear in N; groups of chunks are computed at once, then handed on.
    """
    n_chunks = added_BN.shape[1]
    if n_chunks <= _LOOP:
        before = [state_B]
        for added, decay in zip(added_BN.unbind(1), decay_BN.unbind(1), strict=True):
            before.append(torch.addcmul(added, decay, before[-1]))
        return torch.stack(before[:-1], 1), before[-1]
    missing = -n_chunks % _LOOP
    added_BNL = _filled(added_BN, missing, 0).unflatten(1, (-1, _LOOP))
    decay_BNL = _filled(decay_BN, missing, 1).unflatten(1, (-1, _LOOP))
    local, kept = [torch.zeros_like(added_BNL[:, :, 0])], [torch.ones_like(decay_BNL[:, :, 0])]
    for added, decay in zip(added_BNL.unbind(2), decay_BNL.unbind(2), strict=True):
        local.append(torch.addcmul(added, decay, local[-1]))
        kept.append(decay * kept[-1])
    before_BN, last_B = states_between(local[-1], kept[-1], state_B)
    before_BNL = torch.addcmul(torch.stack(local[:-1], 2), torch.stack(kept[:-1], 2), before_BN[:, :, None])
    return before_BNL.flatten(1, 2)[:, :n_chunks], last_B


def _filled(x: Tensor, missing: int, value: float) -> Tensor:
    """[B, N, ...] with ``missing`` chunks more."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing), value=value) if missing else x
