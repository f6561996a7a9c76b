"""What a refinement step does over the vocabulary, a chunk of tokens at a time, and what it draws.

With s = softmax(p) and u the energy's gradient by e = s W, a step is one of

    by the distribution:  p' = s - a dE/ds,    dE/ds = u W^T
    by the logits:        p' = p - a dE/dp,    dE/dp = s * (u W^T - <s, u W^T>)

so only vectors of width D are differentiated by ``torch.func.grad``. A chunk's [C, V] intermediates are computed again in the
backward: of each step one [B, T, V] state in fp32 is kept, and nothing else of that size.

Shapes: B rows, T tokens, N = B T tokens, C tokens of a chunk, D model dim, V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from titanarch.contract.sequence import SequenceInfo
from titanarch.models.ebt.config import GradientBy
from titanarch.ops.counter_random import normal, uniform, uniform_integers
from titanarch.ops.cross_entropy import IGNORED

_CHUNK_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Elements of a chunk: near a CPU's cache; large products on a GPU."""

EVALUATION_SEED = 0
"""Evaluation starts from this seed's noise, keyed by position in the document alone: the same for every row and layout."""

_START, _COUNT, _STEPS = 1 << 20, (1 << 20) + 1, (1 << 20) + 2
"""Sites of draws, above those of blocks; a step has two from _STEPS on."""

ScoredChunk = tuple[Tensor, Tensor, Tensor]


class Scored(NamedTuple):
    """After a step: logits [B, T, V], and cross-entropy and squared log-partition [B, T], 0 without a target."""

    p_BTV: Tensor
    loss_BT: Tensor
    z_BT: Tensor


def embedded(p_BTV: Tensor, weight_VD: Tensor) -> Tensor:
    """softmax(p) W, [B, T, D] in W's dtype."""
    p_NV = p_BTV.flatten(0, 1)
    parts = [_recomputed(_embed, p_NV[part], weight_VD) for part in _chunks(p_NV)]
    return torch.cat(parts).unflatten(0, p_BTV.shape[:2])


def descended(p_BTV: Tensor, u_BTD: Tensor, weight_VD: Tensor, size_BT: Tensor, labels_BT: Tensor, *, gradient_by: GradientBy) -> Scored:
    """One step down: p', and what it costs on the labels. ``size_BT``: the step size of each token."""
    descend = _descend_by_distribution if gradient_by == "distribution" else _descend_by_logits
    p_NV, u_ND, size_N, labels_N = p_BTV.flatten(0, 1), u_BTD.flatten(0, 1), size_BT.flatten(), labels_BT.flatten()
    parts = [_recomputed(descend, p_NV[part], u_ND[part], weight_VD, size_N[part], labels_N[part]) for part in _chunks(p_NV)]
    p_NV, loss_N, z_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return Scored(p_NV.view_as(p_BTV), loss_N.view_as(labels_BT), z_N.view_as(labels_BT))


def first_prediction(shape: tuple[int, int, int], seq: SequenceInfo, *, start: str, dtype: torch.dtype) -> Tensor:
    """[B, T, V]: zeros, or N(0, 1) keyed like dropout; in evaluation as EVALUATION_SEED says."""
    p_BTV = torch.zeros(shape, dtype=dtype, device=seq.position_BT.device)
    return p_BTV if start == "zeros" else _with_noise(p_BTV, seq, 1.0, _START)


def shaken(p_BTV: Tensor, seq: SequenceInfo, std: float, step: int) -> Tensor:
    """Predictions with Langevin noise before step number ``step``; as they are in evaluation."""
    if std == 0 or seq.seed is None:
        return p_BTV
    return p_BTV + _with_noise(torch.zeros_like(p_BTV), seq, std, _STEPS + 2 * step)


def step_counts(seq: SequenceInfo, n_steps: int, random_steps: int) -> Tensor:
    """Steps that each row takes in training, int64 [B]."""
    if seq.seed is None or random_steps == 0:
        return torch.full_like(seq.row_B, n_steps + random_steps)
    return n_steps + uniform_integers(seq.seed, seq.row_B, _COUNT, random_steps + 1)


def size_factors(seq: SequenceInfo, scale: float, step: int, dtype: torch.dtype) -> Tensor:
    """Factors of the step size, [B, T], uniform between 1 / scale and scale; 1 in evaluation."""
    if seq.seed is None or scale == 1:
        return torch.ones(seq.position_BT.shape, dtype=dtype, device=seq.position_BT.device)
    draw_BT1 = uniform(seed=seq.seed, row_B=seq.row_B, index_T=seq.index_T, site=_STEPS + 2 * step + 1, n_channels=1)
    return (1 / scale + draw_BT1.to(dtype) * (scale - 1 / scale)).squeeze(-1)


def _embed(p_CV: Tensor, weight_VD: Tensor) -> Tensor:
    return torch.softmax(p_CV, -1).to(weight_VD.dtype) @ weight_VD


def _descend_by_distribution(p_CV: Tensor, u_CD: Tensor, weight_VD: Tensor, size_C: Tensor, labels_C: Tensor) -> ScoredChunk:
    gradient_CV = (u_CD @ weight_VD.t()).to(p_CV.dtype)
    return _score(torch.softmax(p_CV, -1) - size_C[:, None] * gradient_CV, labels_C)


def _descend_by_logits(p_CV: Tensor, u_CD: Tensor, weight_VD: Tensor, size_C: Tensor, labels_C: Tensor) -> ScoredChunk:
    s_CV = torch.softmax(p_CV, -1)
    h_CV = (u_CD @ weight_VD.t()).to(p_CV.dtype)
    gradient_CV = s_CV * (h_CV - (s_CV * h_CV).sum(-1, keepdim=True))
    return _score(p_CV - size_C[:, None] * gradient_CV, labels_C)


def _score(p_CV: Tensor, labels_C: Tensor) -> ScoredChunk:
    lse_C = torch.logsumexp(p_CV, -1)
    is_target_C = labels_C != IGNORED
    loss_C = F.cross_entropy(p_CV, labels_C, ignore_index=IGNORED, reduction="none")
    return p_CV, loss_C, torch.where(is_target_C, lse_C.square(), 0.0)


def _recomputed(function, *arguments: Tensor):  # type: ignore[no-untyped-def]
    """``function`` of tensors, whose intermediates are computed again in the backward."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _chunks(p_NV: Tensor) -> Iterator[slice]:
    size = max(1, _CHUNK_LOGITS.get(p_NV.device.type, _CHUNK_LOGITS["cuda"]) // p_NV.shape[1])
    for start in range(0, p_NV.shape[0], size):
        yield slice(start, min(start + size, p_NV.shape[0]))


def _with_noise(p_BTV: Tensor, seq: SequenceInfo, std: float, site: int) -> Tensor:
    """``p`` filled with N(0, std^2), some tokens at a time: drawing needs several integers an element."""
    is_training = seq.seed is not None
    seed = EVALUATION_SEED if seq.seed is None else seq.seed
    row_B, index_BT = (seq.row_B, seq.index_T.expand_as(seq.position_BT)) if is_training else (seq.row_B * 0, seq.position_BT)
    size = max(1, _CHUNK_LOGITS.get(p_BTV.device.type, _CHUNK_LOGITS["cuda"]) // (p_BTV.shape[0] * p_BTV.shape[2]))
    for start in range(0, p_BTV.shape[1], size):
        part = slice(start, start + size)
        noise = normal(seed=seed, row_B=row_B, index_T=index_BT[:, part], site=site, n_channels=p_BTV.shape[2])
        p_BTV[:, part] = noise.to(p_BTV.dtype) * std
    return p_BTV
