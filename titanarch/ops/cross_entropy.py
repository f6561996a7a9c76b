"""Cross-entropy of a linear head, a chunk of tokens at a time: the logits of all tokens never exist together.

With logits z = cap(h W^T + b), cap(x) = soft_cap tanh(x / soft_cap) or x, and lse = log(sum_v exp(z_v)), a token costs

    loss = lse - z_label,    z-loss = lse^2 (PaLM, arXiv:2204.02311)

and the gradient of ``loss + z_weight lse^2`` is ``dz = (1 + 2 z_weight lse) softmax(z) - onehot(label)``. It is known as soon
as the logits are, so the forward turns each chunk into its part of the gradients of h, W and b and drops it: three matrix
products in all, nothing computed twice (the idea of arXiv:2410.10989). The backward scales them by the upstream number.

Logits, softmax and sums are float32 (float64 for float64 inputs), the weight's gradient too until it is cast at the end. The
products of lower-precision inputs round their logits to that precision except on CUDA, where they come out in float32.

The rows of W may be divided among processes that all score the same tokens (:class:`VocabularyShard`): then each has the
logits of its rows, the largest logit, the sum of exponentials and the target's logit are reduced, and the gradient of h is
the part that its rows give.

Shapes: N tokens, D model dim, V vocabulary (the rows here), C tokens of a chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of a token without a target."""

_CHUNK_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Logits of a chunk, elements: 8 MiB on a CPU, near its cache; 512 MiB on a GPU, whose products must be large."""


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of the head that are here: those from ``first`` on, of a vocabulary divided evenly.

    ``sum``, ``maximum``: reduce a tensor elementwise over the processes that share the vocabulary; no gradient flows.
    """

    first: int
    sum: Callable[[Tensor], Tensor]
    maximum: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CrossEntropy:
    """Scalars. ``total`` = loss_sum + z_weight z_sum, in nats, has a gradient; the sums over valid targets and their count do not."""

    total: Tensor
    loss_sum: Tensor
    z_sum: Tensor
    count: Tensor


def chunked_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    *,
    soft_cap: float | None = None,
    z_weight: float = 0.0,
    chunk_tokens: int | None = None,
    shard: VocabularyShard | None = None,
) -> CrossEntropy:
    """Summed cross-entropy of ``labels_N`` (int64, ``IGNORED`` where there is no target) and its z-loss.

    ``shard``: whose rows ``weight_VD`` and ``bias_V`` are; None: all. Labels are numbers in the whole vocabulary either way.
    ``chunk_tokens``: tokens of a chunk; None: as many as make 2**21 logits on a CPU, 2**27 elsewhere. No valid target at all
    gives zeros, gradients too. The gradients are scaled in place, so a graph runs backward once; there is no second
    derivative (:func:`reference_cross_entropy` has one). Raises ValueError for shapes that do not fit.
    """
    _check(hidden_ND, weight_VD, bias_V, labels_N, chunk_tokens)
    total, loss_sum, z_sum, count = _ChunkedCrossEntropy.apply(
        hidden_ND, weight_VD, bias_V, labels_N, soft_cap or 0.0, z_weight, chunk_tokens, shard, torch.is_grad_enabled()
    )
    return CrossEntropy(total, loss_sum, z_sum, count)


def reference_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    *,
    soft_cap: float | None = None,
    z_weight: float = 0.0,
) -> CrossEntropy:
    """The definition of :func:`chunked_cross_entropy`, with all logits in memory and derivatives of every order."""
    logits_NV = F.linear(hidden_ND, weight_VD, bias_V)
    logits_NV = logits_NV.to(_dtype(logits_NV))
    if soft_cap is not None:
        logits_NV = soft_cap * torch.tanh(logits_NV / soft_cap)
    valid_N = labels_N != IGNORED
    loss_sum = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="sum")
    z_sum = torch.where(valid_N, torch.logsumexp(logits_NV, -1) ** 2, 0.0).sum()
    return CrossEntropy(loss_sum + z_weight * z_sum, loss_sum.detach(), z_sum.detach(), valid_N.sum())


@torch.no_grad()
def token_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    *,
    soft_cap: float | None = None,
    chunk_tokens: int | None = None,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """Cross-entropy of each token, [N] in nats, float32 (float64 for float64 inputs); 0 where there is no target. No gradient."""
    _check(hidden_ND, weight_VD, bias_V, labels_N, chunk_tokens)
    losses = [
        _chunk_losses(_logits(hidden_ND[part], weight_VD, bias_V, soft_cap or 0.0), labels_N[part], shard)[0]
        for part in _chunks(hidden_ND, weight_VD, chunk_tokens)
    ]
    return torch.cat(losses) if losses else hidden_ND.new_zeros(0, dtype=_dtype(hidden_ND))


def _check(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, chunk_tokens: int | None) -> None:
    shapes = [tuple(x.shape) for x in (hidden_ND, weight_VD, labels_N)]
    if [len(shape) for shape in shapes] != [2, 2, 1] or shapes[0][1] != shapes[1][1] or shapes[0][0] != shapes[2][0]:
        raise ValueError(f"hidden, weight and labels must be [N, D], [V, D] and [N]; got {shapes[0]}, {shapes[1]}, {shapes[2]}")
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias must be [{weight_VD.shape[0]}], got {tuple(bias_V.shape)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(hidden_ND: Tensor, weight_VD: Tensor, chunk_tokens: int | None) -> Iterator[slice]:
    n_logits = _CHUNK_LOGITS.get(hidden_ND.device.type, _CHUNK_LOGITS["cuda"])
    size = chunk_tokens or max(1, n_logits // weight_VD.shape[0])
    for start in range(0, hidden_ND.shape[0], size):
        yield slice(start, min(start + size, hidden_ND.shape[0]))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 or float64; CUDA keeps the float32 sums of lower-precision inputs."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).to(_dtype(a))


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, soft_cap: float) -> Tensor:
    logits_CV = _product(hidden_CD, weight_VD.t())
    if bias_V is not None:
        logits_CV += bias_V
    return logits_CV.mul_(1.0 / soft_cap).tanh_().mul_(soft_cap) if soft_cap else logits_CV


def _rows_here(labels_C: Tensor, shard: VocabularyShard | None, n_rows: int) -> tuple[Tensor, Tensor]:
    """Each label's row among the ``n_rows`` here, and whether it is one of them; some row where it is not."""
    row_C = labels_C if shard is None else labels_C - shard.first
    here_C = (labels_C != IGNORED) if shard is None else (labels_C != IGNORED) & (row_C >= 0) & (row_C < n_rows)
    return row_C.clamp(0, n_rows - 1), here_C


def _chunk_losses(logits_CV: Tensor, labels_C: Tensor, shard: VocabularyShard | None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, 0 without a target, and lse, [C]; softmax [C, V], of the rows here."""
    if shard is not None:
        return _chunk_losses_of_shard(logits_CV, labels_C, shard)
    p_CV = torch.softmax(logits_CV, -1)
    # The largest probability is exp(top - lse), at least 1 / V: two maxima are cheaper than another sum of exponentials.
    lse_C = logits_CV.amax(-1) - p_CV.amax(-1).log()
    target_C = logits_CV.gather(1, labels_C.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(labels_C == IGNORED, 0.0, lse_C - target_C), lse_C, p_CV


def _chunk_losses_of_shard(logits_CV: Tensor, labels_C: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor, Tensor]:
    top_C = shard.maximum(logits_CV.amax(-1))
    p_CV = (logits_CV - top_C[:, None]).exp_()
    row_C, here_C = _rows_here(labels_C, shard, logits_CV.shape[1])
    target_C = torch.where(here_C, logits_CV.gather(1, row_C[:, None]).squeeze(1) - top_C, 0.0)
    total_C, target_C = shard.sum(torch.stack([p_CV.sum(-1), target_C])).unbind()
    log_total_C = total_C.log()
    return torch.where(labels_C == IGNORED, 0.0, log_total_C - target_C), top_C + log_total_C, p_CV.div_(total_C[:, None])


class _ChunkedCrossEntropy(torch.autograd.Function):
    """See :func:`chunked_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        soft_cap: float,
        z_weight: float,
        chunk_tokens: int | None,
        shard: VocabularyShard | None,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needs = [with_gradients and need for need in ctx.needs_input_grad[:3]]
        dtype = _dtype(hidden_ND)
        loss_sum, z_sum = hidden_ND.new_zeros((), dtype=dtype), hidden_ND.new_zeros((), dtype=dtype)
        d_hidden = torch.empty_like(hidden_ND) if needs[0] else None
        d_weight = weight_VD.new_zeros(weight_VD.shape, dtype=dtype) if needs[1] else None
        d_bias = weight_VD.new_zeros(weight_VD.shape[0], dtype=dtype) if needs[2] else None
        for part in _chunks(hidden_ND, weight_VD, chunk_tokens):
            hidden_CD, labels_C = hidden_ND[part], labels_N[part]
            logits_CV = _logits(hidden_CD, weight_VD, bias_V, soft_cap)
            loss_C, lse_C, d_CV = _chunk_losses(logits_CV, labels_C, shard)
            valid_C = (labels_C != IGNORED).to(dtype)
            loss_sum += loss_C.sum()
            z_sum += (lse_C.square() * valid_C).sum()
            if not any(needs):
                continue
            d_CV.mul_((valid_C * (1.0 + 2.0 * z_weight * lse_C))[:, None])
            row_C, here_C = _rows_here(labels_C, shard, d_CV.shape[1])
            d_CV.scatter_add_(1, row_C[:, None], -here_C.to(dtype)[:, None])
            if soft_cap:
                d_CV.mul_(logits_CV.mul_(1.0 / soft_cap).square_().neg_().add_(1.0))
            if d_bias is not None:
                d_bias += d_CV.sum(0)
            d_CV = d_CV.to(hidden_ND.dtype)
            if d_hidden is not None:
                d_hidden[part] = torch.mm(d_CV, weight_VD)
            if d_weight is not None and d_CV.dtype == dtype:
                d_weight.addmm_(d_CV.t(), hidden_CD)
            elif d_weight is not None:
                d_weight += _product(d_CV.t(), hidden_CD)
        ctx.save_for_backward(
            d_hidden,
            None if d_weight is None else d_weight.to(weight_VD.dtype),
            None if d_bias is None or bias_V is None else d_bias.to(bias_V.dtype),
        )
        count = (labels_N != IGNORED).sum()
        total = loss_sum + z_weight * z_sum
        ctx.mark_non_differentiable(loss_sum, z_sum, count)
        return total, loss_sum, z_sum, count

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = [None if grad is None else grad.mul_(d_total.to(grad.dtype)) for grad in ctx.saved_tensors]
        return *grads, None, None, None, None, None, None
