"""What mixers with a matrix state that corrects itself share (arXiv:2412.06464, 2510.26692).

Shapes: B rows, T tokens, H heads (of values), K key channels a head, V value channels a head.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titanarch.config.errors import ConfigError
from titanarch.contract.mixer import MixResult, State, Streams, Transition
from titanarch.contract.sequence import MixSequence
from titanarch.contract.split import ContextParallel
from titanarch.models.mixers.recurrent import FLA, KernelMixer, incoming
from titanarch.ops.delta_recurrence import delta_rule, delta_rule_transition
from titanarch.ops.recurrence_backend import chosen

FLOPS_OF_STATE = 6
"""A token, key channel and value channel: the state predicts, is corrected and is read, a multiply-add each. The recurrence itself is
counted, whatever chunks a kernel makes of it."""


class MatrixStateMixer(KernelMixer):
    """A mixer whose state [V, K] a shard multiplies by a matrix from the right: out = in M + P."""

    @staticmethod
    def compose(later: Transition, earlier: Transition) -> Transition:
        """The shard ``later`` after the shard ``earlier``: M is their product in the order of the tokens."""
        return Transition(earlier.decay @ later.decay, earlier.state @ later.decay + later.state)


class DeltaRuleMixer(MatrixStateMixer):
    """The gated delta rule of Gated DeltaNet and KDA, over the streams q, k, v, step and beta and the parameters a_log_H and dt_bias."""

    context_parallel = (ContextParallel.STATE, ContextParallel.HEADS)
    fp32 = frozenset({"head"})

    @staticmethod
    def mix(config: Any, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence, state: State | None = None) -> MixResult:
        """y [B, T, H, V] of unit queries and keys over sqrt(K), and the state [B, H, V, K], which stops at documents."""
        q, k, v, log_decay, beta = _operands(streams, head_params)
        q, k, backend = unit(q) * q.shape[-1] ** -0.5, unit(k), chosen(config.backend, v, FLA)
        y, last = delta_rule(q, k, v, log_decay, beta, starts_BT=seq.query.starts_BT, state=incoming(state), backend=backend)
        return MixResult(y, state={"recurrent": last})

    @staticmethod
    def transition(config: Any, streams: Streams, head_params: Mapping[str, Tensor], seq: MixSequence) -> Transition:
        """decay M [B, H, K, K], state P [B, H, V, K]."""
        _, k, v, log_decay, beta = _operands(streams, head_params)
        return Transition(*delta_rule_transition(unit(k), v, log_decay, beta, starts_BT=seq.query.starts_BT))


def gated_norm(y_BTHV: Tensor, gain_V: Tensor, gate_BTC: Tensor, gate_by: Callable[[Tensor], Tensor], eps: float) -> Tensor:
    """RMSNorm of each head times its gate, [B, T, C = H V] of the gate's dtype, computed in fp32 at least."""
    wide, V = torch.promote_types(y_BTHV.dtype, torch.float32), y_BTHV.shape[3]
    y = F.rms_norm(y_BTHV.to(wide), (V,), gain_V.to(wide), eps=eps)
    return (y.flatten(2) * gate_by(gate_BTC.to(wide))).to(gate_BTC.dtype)


def divided_width(kind: str, d_model: int, n_heads: int) -> int:
    """Channels a head; ConfigError where the width has no such share."""
    if d_model % n_heads:
        raise ConfigError(f"{kind}: d_model ({d_model}) is not a multiple of n_heads ({n_heads}); change one, or give head_dim")
    return d_model // n_heads


def unit(x_BTHK: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) a head, in fp32 at least and back."""
    x = x_BTHK.to(torch.promote_types(x_BTHK.dtype, torch.float32))
    return (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)).to(x_BTHK.dtype)


def log_decays(step_BTHK: Tensor, head_params: Mapping[str, Tensor]) -> Tensor:
    """-exp(a_log) softplus(step + bias) in fp32 at least, [B, T, H, K or 1]; ``dt_bias`` is [H] or [H, K] as the steps are."""
    bias = head_params["dt_bias"]
    steps = F.softplus(step_BTHK.to(bias.dtype) + bias.reshape(step_BTHK.shape[2:]))
    return -torch.exp(head_params["a_log_H"])[:, None] * steps


def _operands(streams: Streams, head_params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys repeated to the heads of the values; log decays; beta [B, T, H]."""
    q, k, v = streams["q"], streams["k"], streams["v"]
    repeats = v.shape[2] // k.shape[2]
    if repeats > 1:
        q, k = q.repeat_interleave(repeats, dim=2), k.repeat_interleave(repeats, dim=2)
    return q, k, v, log_decays(streams["step"], head_params), torch.sigmoid(streams["beta"].squeeze(-1).to(head_params["a_log_H"].dtype))
