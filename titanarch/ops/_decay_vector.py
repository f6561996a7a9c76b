"""The chunked recurrence with a decay of its own for each key channel (gated linear attention, arXiv:2312.06635).

exp(sum of decays after s up to t) depends on the channel, so it must be shared out to query and key before they are multiplied, and
from a far reference point one of the two shares overflows. Here a chunk is halved again and again: the queries of an upper half meet
the keys of its lower half with the decays counted from the boundary between them, where both shares are at most 1.

Shapes: B rows, N chunks, Q tokens a chunk, H heads, K key dim, V value dim; U blocks in a chunk, M tokens a block.
"""

import torch
from torch import Tensor

from titanarch.ops._decay_chunks import chunked, documents, length_of_chunks, states_between

_WRITTEN_OUT = 2
"""Blocks of so few tokens are multiplied elementwise: their matrix products would be too many and too small."""


def vector_decay(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay_BTHK: Tensor, *, starts_BT: Tensor | None, state_BHKV: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """See ``decay_recurrence``; all in the dtype of the sums."""
    n_tokens = q_BTHK.shape[1]
    length = length_of_chunks(n_tokens, chunk_size)
    q, k, v, g = (chunked(x, length).transpose(2, 3) for x in (q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK))  # [B, N, H, Q, .]
    where = documents(starts_BT, (q.shape[0], q.shape[1]), length, q.device)
    scores, since_start, until_end = _scores(q, k, g)
    from_before = since_start.exp().masked_fill(~where.from_before_BNQ[:, :, None, :, None], 0)
    to_end = until_end.exp().masked_fill(~where.to_end_BNQ[:, :, None, :, None], 0)
    added = (k * to_end).mT @ v
    before, last = states_between(added, from_before[..., -1, :, None], state_BHKV)
    y = (q * from_before) @ before + scores.masked_fill(~where.visible_BNQQ[:, :, None], 0) @ v
    return y.transpose(2, 3).flatten(1, 2)[:, :n_tokens], last


def _scores(q_QK: Tensor, k_QK: Tensor, g_QK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decayed products of queries and the keys up to them, [..., Q, Q]; log decays from the chunk's start to a token, itself included,
    and from a token to the chunk's end, itself excluded, [..., Q, K].

    Bottom up: blocks of M tokens are joined in pairs. Sums only ever add what is of one sign, so fp32 does.
    """
    q, k, since, until = (x.unsqueeze(-2) for x in (q_QK, k_QK, g_QK, torch.zeros_like(g_QK)))  # [..., U, M, K]
    scores = (q * k).sum(-1, keepdim=True)  # [..., U, M, M]
    while q.shape[-3] > 1:
        (q_lower, q_upper), (k_lower, k_upper), (low, high), (since_lower, since_upper), (until_lower, until_upper) = (
            (x[..., 0::2, :, :], x[..., 1::2, :, :]) for x in (q, k, scores, since, until)
        )
        queries, keys = q_upper * since_upper.exp(), k_lower * until_lower.exp()
        written_out = queries.shape[-2] <= _WRITTEN_OUT
        across = (queries[..., :, None, :] * keys[..., None, :, :]).sum(-1) if written_out else queries @ keys.mT
        scores = torch.cat([torch.cat([low, torch.zeros_like(low)], -1), torch.cat([across, high], -1)], -2)
        since, until = (
            torch.cat([since_lower, since_upper + since_lower[..., -1:, :]], -2),
            torch.cat([until_lower + since_upper[..., -1:, :], until_upper], -2),
        )
        q, k = torch.cat([q_lower, q_upper], -2), torch.cat([k_lower, k_upper], -2)
    return scores.squeeze(-3), since.squeeze(-3), until.squeeze(-3)
