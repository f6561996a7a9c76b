"""The chunked recurrence with one decay a head: state space duality (arXiv:2405.21060, section 6).

Shapes: B rows, N chunks, Q tokens a chunk, G heads of keys and queries, R heads that read each, H = G R, K key dim, V value dim.
"""

import torch
from torch import Tensor

from titanarch.ops._decay_chunks import Documents, chunked, documents, length_of_chunks, states_between


def scalar_decay(
    q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay_BTH: Tensor, *, starts_BT: Tensor | None, state_BHKV: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """See ``decay_recurrence``; all in the dtype of the sums."""
    n_tokens, G = q_BTGK.shape[1:3]
    length = length_of_chunks(n_tokens, chunk_size)
    q, k = (chunked(x, length).transpose(2, 3) for x in (q_BTGK, k_BTGK))  # [B, N, G, Q, K]
    v = chunked(v_BTHV, length).unflatten(3, (G, -1)).transpose(2, 3)  # [B, N, G, Q, R, V]
    total_BNQH = chunked(log_decay_BTH.double(), length).cumsum(2)
    where = documents(starts_BT, (q.shape[0], q.shape[1]), length, q.device)

    from_before = _masked_exp(total_BNQH, where.from_before_BNQ, G, v.dtype)
    to_end = _masked_exp(total_BNQH[:, :, -1:] - total_BNQH, where.to_end_BNQ, G, v.dtype)
    R, V = v.shape[4:]
    added = (k.mT @ (v * to_end).flatten(4)).unflatten(4, (R, V))  # [B, N, G, K, R, V]
    state = state_BHKV.unflatten(1, (G, R)).transpose(2, 3)
    before, last = states_between(added, from_before[:, :, :, -1:], state)
    y = (q @ before.flatten(4)).unflatten(4, (R, V)) * from_before
    weights_BNHQQ = _decay_between(total_BNQH, where, v.dtype)
    scores = (q @ k.mT)[:, :, :, None] * weights_BNHQQ.unflatten(2, (G, R))  # [B, N, G, R, Q, Q]
    y = y + (scores @ v.transpose(3, 4)).transpose(3, 4)
    return y.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :n_tokens], last.transpose(2, 3).flatten(1, 2)


def _masked_exp(log_BNQH: Tensor, keep_BNQ: Tensor, n_groups: int, dtype: torch.dtype) -> Tensor:
    """exp of what is kept and 0 elsewhere, [B, N, G, Q, R, 1]."""
    decay = log_BNQH.to(dtype).exp().masked_fill(~keep_BNQ[..., None], 0)
    return decay.unflatten(3, (n_groups, -1)).transpose(2, 3)[..., None]


def _decay_between(total_BNQH: Tensor, where: Documents, dtype: torch.dtype) -> Tensor:
    """What token t (rows) has of token s (columns), [B, N, H, Q, Q]: exp of the log decays after s up to t, 0 where it reads none.

    Differences of long sums lose what a token apart adds, so the sums are of fp64.
    """
    total_BNHQ = total_BNQH.transpose(2, 3)
    between = (total_BNHQ[..., :, None] - total_BNHQ[..., None, :]).to(dtype)
    return between.masked_fill(~where.visible_BNQQ[:, :, None], -torch.inf).exp()
