"""The delta rules by flash-linear-attention, on CUDA. The plain forms of delta_recurrence.py are their references.

Shapes: B rows, T tokens, H heads, K key channels, V value channels, N documents of all rows.
"""

import importlib
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[..., tuple[Tensor, Tensor]]
"""Streams [1, tokens, H, ...] by name, ``initial_state`` [N, H, K, V], ``cu_seqlens`` [N + 1]: y and the state after each document."""


def fla_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, starts_BT: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``delta_rule`` with one decay a head or a key channel; products in the dtype of v."""
    streams = {"q": q.to(v.dtype), "k": k.to(v.dtype), "v": v, "beta": beta.to(v.dtype)}
    if log_decay.shape[-1] == 1:
        kernel = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
        return by_documents(kernel, {**streams, "g": log_decay.float().squeeze(-1)}, starts_BT, state)
    kernel = importlib.import_module("fla.ops.kda").chunk_kda
    return by_documents(kernel, {**streams, "g": log_decay.float()}, starts_BT, state)


def fla_diagonal_plus_low_rank(
    r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, a: Tensor, b: Tensor, *, starts_BT: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``diagonal_plus_low_rank`` for the decays of RWKV-7, log decay >= -e^{-1/2}; products in the dtype of v."""
    kernel = importlib.import_module("fla.ops.rwkv7").chunk_rwkv7
    narrow = {name: x.to(v.dtype) for name, x in (("r", r), ("k", k), ("v", v), ("a", a), ("b", b))}
    return by_documents(kernel, {**narrow, "w": log_decay.float()}, starts_BT, state)


def by_documents(
    kernel: Kernel, streams: Mapping[str, Tensor], starts_BT: Tensor | None, state_BHVK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``kernel`` on every document as a sequence of its own: y [B, T, H, V] and the state after each row, [B, H, V, K].

    A row's first tokens go on from the incoming state unless a document starts there.
    """
    v = streams["v"]
    B, T, H, V = v.shape
    K = streams["k"].shape[-1]
    state = v.new_zeros(B, H, K, V, dtype=torch.float32) if state_BHVK is None else state_BHVK.mT.contiguous()
    if starts_BT is None:
        y, last = kernel(**{name: x.contiguous() for name, x in streams.items()}, scale=1.0, initial_state=state, output_final_state=True)
        return y, last.mT
    row_starts = torch.arange(T, device=v.device) == 0
    first_N = (starts_BT | row_starts).flatten().nonzero().squeeze(1)
    row_N, is_rows_first = first_N // T, first_N % T == 0
    goes_on = is_rows_first & ~starts_BT[row_N, 0]
    incoming = state[row_N].masked_fill(~goes_on[:, None, None, None], 0)
    flat = {name: x.reshape(1, B * T, *x.shape[2:]).contiguous() for name, x in streams.items()}
    ends = F.pad(first_N, (0, 1), value=B * T)
    y, last = kernel(**flat, scale=1.0, initial_state=incoming, output_final_state=True, cu_seqlens=ends)
    is_rows_last = F.pad(is_rows_first[1:], (0, 1), value=True)
    return y.reshape(B, T, H, V), last[is_rows_last].mT
