"""Linear recurrences whose state decays: S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t, from S = 0 at a document's start.

With one decay a head it is state space duality and retention (arXiv:2405.21060, 2307.08621), with one for each key channel gated linear
attention (arXiv:2312.06635). Rows are computed chunk by chunk, time and memory linear in T, and differentiated by autograd. States and
sums are of fp32, or fp64 where an input is.

Shapes: B rows, T tokens, H heads, G heads of keys and queries, K key dim, V value dim.
"""

import torch
from torch import Tensor

from titanarch.ops._decay_kernels import fla_recurrence
from titanarch.ops._decay_scalar import scalar_decay
from titanarch.ops._decay_vector import vector_decay
from titanarch.ops.recurrence_backend import REFERENCE
from titanarch.ops.segments import in_segments


def decay_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    starts_BT: Tensor | None,
    state: Tensor | None,
    chunk_size: int = 64,
    backend: str = REFERENCE,
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] and the state after the last token, [B, H, K, V], both in the dtype of the sums.

    q, k: [B, T, G, K]; head j of H reads number j * G // H. v: [B, T, H, V]. log_decay: [B, T, H], or [B, T, H, K] (then G = H), at most
    0. starts_BT: whether a token is the first of its document, bool; None where only rows' first tokens are, and what came before them
    is to be kept. state: before the first token, [B, H, K, V]; None: zero. chunk_size: tokens a chunk; a power of two, or the next
    lower one is used. backend: ``reference``, or ``fla``, whose y has the dtype of v and whose chunks are its own.
    """
    if backend == "fla":
        _, _, _, g, S = _prepared(q, k, v, log_decay, state)
        return fla_recurrence(_heads(q, v.shape[2]), _heads(k, v.shape[2]), v, g, starts_BT=starts_BT, state=S)
    assert backend == REFERENCE, f"no backend '{backend}'"
    q, k, v, log_decay, state = _prepared(q, k, v, log_decay, state)
    chunked = scalar_decay if log_decay.dim() == 3 else vector_decay

    def recur(*inputs: Tensor, starts_BT: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        return chunked(*inputs, starts_BT=starts_BT, state_BHKV=state, chunk_size=chunk_size)

    return in_segments(recur, (q, k, v, log_decay), starts_BT=starts_BT, state=state)


def decay_transition(k: Tensor, v: Tensor, log_decay: Tensor, *, starts_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the tokens do to the state, without outputs: decay [B, H, 1 or K, 1] and the state they leave from zero, [B, H, K, V].

    Arguments as of ``decay_recurrence``. One product of all keys and values: no decay after a token exceeds 1.
    """
    _, k, v, log_decay, _ = _prepared(k, k, v, log_decay, None)
    if log_decay.dim() == 3:
        k, log_decay = _heads(k, v.shape[2]), log_decay[..., None]
    total = log_decay.double().cumsum(1)
    kept = (total[:, -1:] - total).to(v.dtype).exp()
    decay = total[:, -1].to(v.dtype).exp()
    if starts_BT is not None:
        n_BT = starts_BT.to(torch.int32).cumsum(1)
        kept = kept.masked_fill((n_BT != n_BT[:, -1:])[:, :, None, None], 0)
        decay = decay.masked_fill((n_BT[:, -1] > 0)[:, None, None], 0)
    return decay[..., None], (k * kept).permute(0, 2, 3, 1) @ v.transpose(1, 2)


def decay_recurrence_naive(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, starts_BT: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``decay_recurrence`` token by token as its equation says: the reference."""
    q, k, v, log_decay, S = _prepared(q, k, v, log_decay, state)
    q, k = _heads(q, v.shape[2]), _heads(k, v.shape[2])
    decay = (log_decay[..., None] if log_decay.dim() == 3 else log_decay).exp()[..., None]
    if starts_BT is not None:
        decay = decay.masked_fill(starts_BT[:, :, None, None, None], 0)
    outputs = []
    for q_BHK, k_BHK, v_BHV, decay_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), decay.unbind(1), strict=True):
        S = decay_t * S + k_BHK[..., :, None] * v_BHV[..., None, :]
        outputs.append((S * q_BHK[..., None]).sum(-2))
    return torch.stack(outputs, 1), S


def _prepared(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All in the dtype of the sums, with a state."""
    n_heads, n_shared = v.shape[2], k.shape[2]
    assert log_decay.shape in (v.shape[:3], k.shape), f"log_decay {tuple(log_decay.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}"
    dtype = torch.float32
    for x in (q, k, v, log_decay):
        dtype = torch.promote_types(dtype, x.dtype)
    if n_heads % n_shared:
        q, k = _heads(q, n_heads), _heads(k, n_heads)
    if state is None:
        state = v.new_zeros(v.shape[0], n_heads, k.shape[3], v.shape[3], dtype=dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype), log_decay.to(dtype), state.to(dtype)


def _heads(x_BTGK: Tensor, n_heads: int) -> Tensor:
    """The head that each of ``n_heads`` reads, [B, T, H, K]."""
    G = x_BTGK.shape[2]
    return x_BTGK if n_heads == G else x_BTGK[:, :, [j * G // n_heads for j in range(n_heads)]]
