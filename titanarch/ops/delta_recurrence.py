"""Recurrences that correct what they remember: the delta rule with decay, in chunks (arXiv:2406.06484, 2412.06464, 2510.26692).

The state S [V, K] of a head obeys S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T and is read as y_t = S_t q_t. ``delta_rule`` is
the case of Gated DeltaNet and Kimi Delta Attention, S_t = S_{t-1} diag(w_t) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T;
``diagonal_plus_low_rank`` is the general one, which RWKV-7 needs (arXiv:2503.14456).

In a chunk, the tokens' own writes depend on each other through a unit triangular system (the WY, or UT, form); solving it for all
chunks at once leaves each chunk as one map of the state, S -> S M + P, and a short loop over chunks. Everything is computed in fp32
at least; exponents are never positive. Memory and time are linear in T.

Shapes: B rows, T tokens, H heads, K key channels, V value channels; N chunks of C tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titanarch.ops._decayed_pairs import decayed_pairs
from titanarch.ops._delta_kernels import fla_delta_rule, fla_diagonal_plus_low_rank
from titanarch.ops.recurrence_backend import REFERENCE
from titanarch.ops.segments import in_segments

CHUNK = 64
"""Tokens a chunk."""
FORGET = -1e4
"""The log decay of a document's first token: its exponential is 0 in every dtype, its sums are finite."""


class _Chunks(NamedTuple):
    """What each chunk does: ``update`` M [B, H, N, K, K] and ``added`` P [B, H, N, V, K] to the state; ``read`` [B, H, N, C, K] and
    ``inner`` [B, H, N, C, V] give y = read S^T + inner of the state before the chunk; None where no queries were given."""

    update: Tensor
    added: Tensor
    read: Tensor | None
    inner: Tensor | None


def delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor,
    beta_BTH: Tensor,
    *,
    starts_BT: Tensor | None,
    state: Tensor | None,
    backend: str = REFERENCE,
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] in the dtype of v, and the state after the last token, [B, H, V, K] in fp32 (fp64 for fp64).

    log_decay <= 0: [B, T, H, 1], one a head, or [B, T, H, K], one a key channel. starts_BT: True at a document's first token, where what
    came before is forgotten; None: nowhere. state: what comes in, [B, H, V, K]; None: zero. backend: ``reference``, or ``fla`` on CUDA.
    """
    if backend == "fla":
        return fla_delta_rule(q_BTHK, k_BTHK, v_BTHV, log_decay, beta_BTH, starts_BT=starts_BT, state=state)
    assert backend == REFERENCE, f"no backend '{backend}'"

    def recur(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, starts_BT: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _run(_delta_chunks(q, k, v, log_decay, beta, starts_BT), state, v)

    return in_segments(recur, (q_BTHK, k_BTHK, v_BTHV, log_decay, beta_BTH), starts_BT=starts_BT, state=state)


def delta_rule_transition(
    k_BTHK: Tensor, v_BTHV: Tensor, log_decay: Tensor, beta_BTH: Tensor, *, starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What all the tokens do to a state, S -> S M + P: M [B, H, K, K] and P [B, H, V, K]. Arguments as in ``delta_rule``."""
    return _chain(_delta_chunks(None, k_BTHK, v_BTHV, log_decay, beta_BTH, starts_BT))


def diagonal_plus_low_rank(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTHK: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    *,
    starts_BT: Tensor | None,
    state: Tensor | None,
    backend: str = REFERENCE,
) -> tuple[Tensor, Tensor]:
    """The general recurrence: y and final state as in ``delta_rule``. The transition matrix is diag(exp(log_decay)) + a b^T."""
    operands = (q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK, a_BTHK, b_BTHK)
    if backend == "fla":
        return fla_diagonal_plus_low_rank(*operands, starts_BT=starts_BT, state=state)
    assert backend == REFERENCE, f"no backend '{backend}'"

    def recur(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, *, starts_BT: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _run(_general_chunks(q, k, v, g, a, b, starts_BT), state, v)

    return in_segments(recur, operands, starts_BT=starts_BT, state=state)


def diagonal_plus_low_rank_transition(
    k_BTHK: Tensor, v_BTHV: Tensor, log_decay_BTHK: Tensor, a_BTHK: Tensor, b_BTHK: Tensor, *, starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What all the tokens do to a state, S -> S M + P: M [B, H, K, K] and P [B, H, V, K]."""
    return _chain(_general_chunks(None, k_BTHK, v_BTHV, log_decay_BTHK, a_BTHK, b_BTHK, starts_BT))


def naive_recurrence(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTHK: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    *,
    starts_BT: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token: what the chunked forms are compared with."""
    dtype = torch.promote_types(v_BTHV.dtype, torch.float32)
    q, k, v, g, a, b = (x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK, a_BTHK, b_BTHK))
    S = v.new_zeros(*v.shape[:1], *v.shape[2:], k.shape[-1]) if state is None else state.to(dtype)
    outputs = []
    for t in range(v.shape[1]):
        if starts_BT is not None:
            S = S.masked_fill(starts_BT[:, t, None, None, None], 0)
        corrected = (S @ a[:, t, :, :, None]) * b[:, t, :, None, :]
        S = S * torch.exp(g[:, t, :, None, :]) + corrected + v[:, t, :, :, None] * k[:, t, :, None, :]
        outputs.append((S @ q[:, t, :, :, None]).squeeze(-1))
    return torch.stack(outputs, 1).to(v_BTHV.dtype), S


def _delta_chunks(q: Tensor | None, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, starts: Tensor | None) -> _Chunks:
    """The writes are [V, C] Z = S W^T + Z_0, and (I + diag(beta) A) [W | Z_0] = diag(beta) [-k decayed | v] with A of decayed k k^T."""
    g = _chunked(_forgetting(log_decay, starts), v)
    q, k, v, beta = None if q is None else _chunked(q, v), _chunked(k, v), _chunked(v, v), _chunked(beta.unsqueeze(-1), v)
    w = torch.exp(g)
    rows = [k * w] if q is None else [k * w, q * w]
    pairs, decays = decayed_pairs(torch.stack(rows, -2), k.unsqueeze(-2), g)
    before = torch.exp(decays.before)
    system = beta * pairs[..., :, 0, :, 0]
    written = _solved(system, beta * torch.cat([-rows[0] * before, v], -1))
    update, added = (written.mT @ (k * torch.exp(decays.after))).split([k.shape[-1], v.shape[-1]], -2)
    update = update + _diagonal(decays.total, k.shape[-1])
    if q is None:
        return _Chunks(update, added, None, None)
    seen = pairs[..., :, 1, :, 0] + torch.diag_embed((q * k).sum(-1))
    read, inner = (seen @ written).split([k.shape[-1], v.shape[-1]], -1)
    return _Chunks(update, added, rows[1] * before + read, inner)


def _general_chunks(q: Tensor | None, k: Tensor, v: Tensor, log_decay: Tensor, a: Tensor, b: Tensor, starts: Tensor | None) -> _Chunks:
    """Beside v k^T, tokens write U b^T with U = S W^T + U_0, and (I - A_ab) [W | U_0] = [a decayed | A_ak v]."""
    if starts is not None:
        a = a.masked_fill(starts[:, :, None, None], 0)
    g = _chunked(_forgetting(log_decay, starts), v)
    q = None if q is None else _chunked(q, v)
    k, v, a, b = (_chunked(x, v) for x in (k, v, a, b))
    K, V = k.shape[-1], v.shape[-1]
    rows = [a] if q is None else [a, q * torch.exp(g)]
    pairs, decays = decayed_pairs(torch.stack(rows, -2), torch.stack([b, k], -2), g)
    before, after = torch.exp(decays.before), torch.exp(decays.after)
    written = _solved(-pairs[..., :, 0, :, 0], torch.cat([a * before, pairs[..., :, 0, :, 1] @ v], -1))
    update, added = (written.mT @ (b * after)).split([K, V], -2)
    update, added = update + _diagonal(decays.total, K), added + v.mT @ (k * after)
    if q is None:
        return _Chunks(update, added, None, None)
    seen_b = pairs[..., :, 1, :, 0] + torch.diag_embed((q * b).sum(-1))
    seen_k = pairs[..., :, 1, :, 1] + torch.diag_embed((q * k).sum(-1))
    read, inner = (seen_b @ written).split([K, V], -1)
    return _Chunks(update, added, rows[1] * before + read, inner + seen_k @ v)


def _forgetting(log_decay: Tensor, starts_BT: Tensor | None) -> Tensor:
    return log_decay if starts_BT is None else log_decay.masked_fill(starts_BT[:, :, None, None], FORGET)


def _chunked(x_BTHK: Tensor, like: Tensor) -> Tensor:
    """[B, H, N, C, K], zeros after the end, in fp32 or like's dtype if that is wider. A token of zeros leaves the state alone."""
    T = x_BTHK.shape[1]
    C = min(CHUNK, 1 << (T - 1).bit_length())
    x = x_BTHK.transpose(1, 2).to(torch.promote_types(like.dtype, torch.float32))
    return F.pad(x, (0, 0, 0, -T % C)).unflatten(2, (-1, C)).contiguous()


def _solved(strictly_lower: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(strictly_lower, right, upper=False, unitriangular=True)


def _diagonal(log_total: Tensor, n_channels: int) -> Tensor:
    """[*, 1, K or 1] to [*, K, K]."""
    return torch.diag_embed(torch.exp(log_total).squeeze(-2).expand(*log_total.shape[:-2], n_channels))


def _run(chunks: _Chunks, state: Tensor | None, v_BTHV: Tensor) -> tuple[Tensor, Tensor]:
    assert chunks.read is not None, "chunks made with queries"
    assert chunks.inner is not None, "chunks made with queries"
    first = torch.zeros_like(chunks.added[:, :, 0]) if state is None else state.to(chunks.added.dtype)
    states = _states(first, chunks.update, chunks.added)
    y = chunks.inner + chunks.read @ torch.stack(states[:-1], 2).mT
    return y.flatten(2, 3)[:, :, : v_BTHV.shape[1]].transpose(1, 2).to(v_BTHV.dtype), states[-1]


def _chain(chunks: _Chunks) -> tuple[Tensor, Tensor]:
    """All chunks as one map: the recurrence of the states, started from the identity above a zero state."""
    update, added = chunks.update, chunks.added
    K, V = added.shape[-1], added.shape[-2]
    eye = torch.eye(K, dtype=added.dtype, device=added.device).expand(*added.shape[:2], K, K)
    last = _states(F.pad(eye, (0, 0, 0, V)), update, F.pad(added, (0, 0, K, 0)))[-1]
    M, P = last.split([K, V], -2)
    return M, P


def _states(first: Tensor, update: Tensor, added: Tensor) -> list[Tensor]:
    """The state before each chunk, and after the last."""
    states = [first]
    for M, P in zip(update.unbind(2), added.unbind(2), strict=True):
        states.append(states[-1] @ M + P)
    return states
