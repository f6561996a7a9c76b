"""Long rows on a CPU, a segment of tokens at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SEGMENT_TOKENS = 2048
"""Beyond, what a chunked recurrence makes on its way outgrows what the allocator keeps: each tensor then costs fresh pages."""

Recurrence = Callable[..., tuple[Tensor, Tensor]]


def in_segments(
    recurrence: Recurrence, inputs: Sequence[Tensor], *, starts_BT: Tensor | None, state: Tensor | None, n_tokens: int = SEGMENT_TOKENS
) -> tuple[Tensor, Tensor]:
    """``recurrence(*inputs, starts_BT=..., state=...)``, its outputs [B, T, ...] and last state, by at most ``n_tokens`` tokens at a time.

    ``inputs``: each [B, T, ...]. Every segment goes on from the state that the one before left, so the result is the same but for
    rounding; time and memory grow with T as they do below ``n_tokens``. On other devices than a CPU it is called once.
    """
    length = inputs[0].shape[1]
    if length <= n_tokens or inputs[0].device.type != "cpu":
        return recurrence(*inputs, starts_BT=starts_BT, state=state)
    pieces = zip(*(x.split(n_tokens, 1) for x in inputs), strict=True)
    starts = [None] * -(-length // n_tokens) if starts_BT is None else starts_BT.split(n_tokens, 1)
    outputs = []
    for piece, starts_of_piece in zip(pieces, starts, strict=True):
        y, state = recurrence(*piece, starts_BT=starts_of_piece, state=state)
        outputs.append(y)
    assert state is not None, "a row has tokens"
    return torch.cat(outputs, 1), state
