"""What mixers with a matrix state that corrects itself share (arXiv:2412.06464, 2510.26692).

Shapes: B rows, T tokens, H heads (of values), K key channels a head, V value channels a head.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Size, Tensor

from titanarch.config.errors import ConfigError
from titanarch.contract.mixer import MixResult, RecurrentMixer, State, Streams, Transition
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.ops.delta_recurrence import delta_rule, delta_rule_transition
from titanarch.ops.recurrence_backend import chosen, why_not

KERNELS = ("fla",)
"""Packages whose kernels serve the delta rules."""

Backend = Literal["auto", "reference", "fla"]
BACKEND = "who computes the recurrence: plain PyTorch (reference), or on CUDA the kernels of a package; auto: as installed"

FLOPS_OF_STATE = 6
"""A token, key channel and value channel: the state predicts, is corrected and is read, a multiply-add each. The recurrence itself is
counted, whatever chunks a kernel makes of it."""

MIN_STEP, MAX_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4
"""Initial step sizes, as in Mamba-2 (arXiv:2405.21060)."""


class MatrixStateMixer(RecurrentMixer):
    """A mixer whose state [V, K] a shard multiplies by a matrix from the right: out = in M + P."""

    def why_not_on(self, device_type: str, *, compiled: bool) -> str:
        return why_not(self.config.backend, device_type, compiled=compiled)

    @staticmethod
    def compose(later: Transition, earlier: Transition) -> Transition:
        """The shard ``later`` after the shard ``earlier``: M is their product in the order of the tokens."""
        return Transition(earlier.decay @ later.decay, earlier.state @ later.decay + later.state)


def divided_width(kind: str, d_model: int, n_heads: int) -> int:
    """Channels a head; ConfigError where the width has no such share."""
    if d_model % n_heads:
        raise ConfigError(f"{kind}: d_model ({d_model}) is not a multiple of n_heads ({n_heads}); change one, or give head_dim")
    return d_model // n_heads


def document_starts(seq: SequenceInfo) -> Tensor | None:
    """[B, T], True where a document starts; None where every row is one document, before which there is no state."""
    return seq.position_BT == 0 if seq.packed else None


def unit(x_BTHK: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) a head, in fp32 at least and back."""
    x = x_BTHK.to(torch.promote_types(x_BTHK.dtype, torch.float32))
    return (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)).to(x_BTHK.dtype)


def log_decays(step_BTHK: Tensor, head_params: Mapping[str, Tensor]) -> Tensor:
    """-exp(a_log) softplus(step + bias) in fp32 at least, [B, T, H, K or 1]; ``dt_bias`` is [H] or [H, K] as the steps are."""
    bias = head_params["dt_bias"]
    steps = F.softplus(step_BTHK.to(bias.dtype) + bias.reshape(step_BTHK.shape[2:]))
    return -torch.exp(head_params["a_log_H"])[:, None] * steps


def mix_delta_rule(streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: State | None, backend: str) -> MixResult:
    """y [B, T, H, V] of unit queries and keys over sqrt(K), and the state."""
    q, k, v, log_decay, beta = _operands(streams, head_params)
    starts, before = document_starts(seq.query), None if state is None else state["recurrent"]
    q, k, backend = unit(q) * q.shape[-1] ** -0.5, unit(k), chosen(backend, v, KERNELS)
    y, last = delta_rule(q, k, v, log_decay, beta, starts_BT=starts, state=before, backend=backend)
    return MixResult(y, state={"recurrent": last})


def delta_transition(streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> Transition:
    """M [B, H, K, K] and P [B, H, V, K]."""
    _, k, v, log_decay, beta = _operands(streams, head_params)
    return Transition(*delta_rule_transition(unit(k), v, log_decay, beta, starts_BT=document_starts(seq.query)))


def _operands(streams: Streams, head_params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys repeated to the heads of the values; log decays; beta [B, T, H]."""
    q, k, v = streams["q"], streams["k"], streams["v"]
    repeats = v.shape[2] // k.shape[2]
    if repeats > 1:
        q, k = q.repeat_interleave(repeats, dim=2), k.repeat_interleave(repeats, dim=2)
    return q, k, v, log_decays(streams["step"], head_params), torch.sigmoid(streams["beta"].squeeze(-1).to(head_params["a_log_H"].dtype))


def log_uniform(low: float, high: float, shape: Size, generator: Generator) -> Tensor:
    """log A with A ~ U(low, high)."""
    return torch.log(torch.rand(shape, generator=generator) * (high - low) + low)


def step_biases(shape: Size, generator: Generator) -> Tensor:
    """The inverse softplus of steps drawn log-uniformly."""
    spread = math.log(MAX_STEP / MIN_STEP)
    steps = torch.exp(torch.rand(shape, generator=generator) * spread + math.log(MIN_STEP)).clamp(min=STEP_FLOOR)
    return steps + torch.log(-torch.expm1(-steps))
