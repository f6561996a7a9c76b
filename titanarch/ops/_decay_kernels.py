"""Kernels of other packages on CUDA, for the recurrences of decay_recurrence.py and the convolutions before them.

The plain form is the reference of each.

Shapes: B rows, T tokens, H heads, G heads of keys and queries, K key dim, V value dim.
"""

import importlib

import torch
from torch import Tensor

FORGET = -150.0
"""Log decay of a document's first token: its exponential is 0 in fp32, and near it fp32 still tells 1e-5 apart."""


def fla_recurrence(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, starts_BT: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """``decay_recurrence`` by flash-linear-attention: q, k [B, T, H, K] and v in one dtype, the rest in fp32.

    Documents need no lengths: a log decay that forgets everything stands at their first tokens.
    """
    if starts_BT is not None:
        log_decay = log_decay.masked_fill(starts_BT.reshape(*starts_BT.shape, *[1] * (log_decay.dim() - 2)), FORGET)
    arguments = {"scale": 1.0, "initial_state": state, "output_final_state": True}
    if log_decay.dim() == 3:
        recur = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    else:
        recur = importlib.import_module("fla.ops.gla").chunk_gla
    y, last = recur(q.contiguous(), k.contiguous(), v.contiguous(), g=log_decay.contiguous(), **arguments)
    return y, last


def causal_convolution(x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_BT: Tensor | None) -> Tensor:
    """y_t = sum over n < W of weight[:, W - 1 - n] x_{t-n}, plus the bias, by causal-conv1d; nothing of another document enters."""
    convolve = importlib.import_module("causal_conv1d").causal_conv1d_fn
    documents_BT = None if document_BT is None else document_BT.to(torch.int32).contiguous()
    # Channels last, as its documents need it.
    y_BCT: Tensor = convolve(x_BTC.contiguous().mT, weight_CW.contiguous(), bias_C, seq_idx=documents_BT, activation=None)
    return y_BCT.mT


def mamba_ssm_recurrence(
    x_BTHV: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGK: Tensor,
    c_BTGK: Tensor,
    *,
    starts_BT: Tensor | None,
    state_BHKV: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The recurrence of Mamba-2 by mamba-ssm, log decay dt a, keys b, values dt x, queries c: y [B, T, H, V], state [B, H, K, V].

    Its documents are numbered from that of the incoming state, which is 0.
    """
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    documents_BT = None if starts_BT is None else starts_BT.cumsum(1, dtype=torch.int32)
    y, last_BHVK = scan(
        x_BTHV,
        dt_BTH,
        a_H,
        b_BTGK,
        c_BTGK,
        chunk_size=chunk_size,
        initial_states=state_BHKV.mT.contiguous(),
        seq_idx=documents_BT,
        return_final_states=True,
    )
    return y, last_BHVK.mT
