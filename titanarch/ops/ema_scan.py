"""Exponential moving average along a sequence, with a weight for each token: y_t = w_t x_t + (1 - w_t) y_{t-1}.

It equals a state-space scan with decay 1 - w_t. Tokens are cut into chunks: inside a chunk the recurrence is a product with a
lower triangular matrix of decays, and the last values of the chunks are the same recurrence on a shorter sequence.

Shapes: B rows, T tokens, D channels, C chunks, Q tokens a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Tokens a chunk."""


def ema_scan(x_BTD: Tensor, weight_BT: Tensor, starts_BT: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """The averages, [B, T, D], in float32 at least.

    ``weight_BT``: in (0, 1), of each token against the average before it. ``starts_BT``: where an average begins anew, which is
    there the token itself whatever its weight; the first token of a row is one.
    """
    dtype = torch.promote_types(torch.promote_types(x_BTD.dtype, weight_BT.dtype), torch.float32)
    starts_BT = torch.cat([torch.ones_like(starts_BT[:, :1]), starts_BT[:, 1:]], dim=1)
    weight_BT = weight_BT.to(dtype).masked_fill(starts_BT, 0.5)  # a weight of 1 has no logarithm below
    entering_BTD = x_BTD.to(dtype) * weight_BT.masked_fill(starts_BT, 1.0)[..., None]
    return _recurrence(entering_BTD, torch.log1p(-weight_BT).masked_fill(starts_BT, 0.0), starts_BT, chunk)


def ema_loop(x_BTD: Tensor, weight_BT: Tensor, starts_BT: Tensor) -> Tensor:
    """The reference: ``ema_scan`` a token at a time."""
    averages: list[Tensor] = []
    for t in range(x_BTD.shape[1]):
        x_BD, w_B1 = x_BTD[:, t], weight_BT[:, t, None]
        averages.append(x_BD if t == 0 else torch.where(starts_BT[:, t, None], x_BD, w_B1 * x_BD + (1 - w_B1) * averages[-1]))
    return torch.stack(averages, dim=1)


def _recurrence(u_BTD: Tensor, log_decay_BT: Tensor, starts_BT: Tensor, chunk: int) -> Tensor:
    """y_t = exp(log_decay_t) y_{t-1} + u_t, and u_t where something starts. Logarithms are at most 0, and 0 at starts."""
    T = u_BTD.shape[1]
    Q = min(chunk, T)
    padding = -T % Q
    u_BCQD = F.pad(u_BTD, (0, 0, 0, padding)).unflatten(1, (-1, Q))
    log_BCQ = F.pad(log_decay_BT, (0, padding)).unflatten(1, (-1, Q))
    starts_BCQ = F.pad(starts_BT, (0, padding)).unflatten(1, (-1, Q))
    # Sums of negative numbers alone: a difference of two cumulative sums would cancel.
    below_QQ = torch.ones(Q, Q, dtype=torch.bool, device=u_BTD.device).tril(-1)
    since_BCQQ = log_BCQ[..., None].expand(-1, -1, -1, Q).masked_fill(~below_QQ, 0.0).cumsum(-2)
    part_BCQ = starts_BCQ.to(torch.int32).cumsum(-1)
    seen_BCQQ = (part_BCQ[..., :, None] == part_BCQ[..., None, :]) & torch.ones_like(below_QQ).tril()
    y_BCQD = torch.exp(since_BCQQ).masked_fill(~seen_BCQQ, 0.0) @ u_BCQD
    if log_BCQ.shape[1] > 1:
        last_BCD = _recurrence(y_BCQD[:, :, -1], log_BCQ.sum(-1), starts_BCQ.any(-1), chunk)
        before_BCD = torch.cat([torch.zeros_like(last_BCD[:, :1]), last_BCD[:, :-1]], dim=1)
        reaching_BCQ = torch.exp(log_BCQ.cumsum(-1)).masked_fill(part_BCQ > 0, 0.0)
        y_BCQD = y_BCQD + reaching_BCQ[..., None] * before_BCD[:, :, None]
    return y_BCQD.flatten(1, 2)[:, :T]
