"""From tokens to chunks and back, in slots of a fixed number.

A row of T tokens has S slots for chunks. Those that it does not fill come last, belong to a document of their own and are
zero, so what reads only earlier tokens of its own document never sees them. No shape depends on the data, and no number
is brought to the host.

Shapes: B rows, T tokens, S slots, D channels of a token, E channels of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from titanarch.contract.sequence import SequenceInfo
from titanarch.ops.ema_scan import ema_scan

LEAST_WEIGHT, MOST_WEIGHT = 1e-4, 1 - 1e-4
"""What boundary probabilities are clamped to as weights of the moving average."""
SLOT_MULTIPLE = 16
"""Slots are a multiple of this, or all tokens: matrix products in 8 bits need it."""
SEED_STEP = 0x5851F42D4C957F2D
"""Between the seeds of a stage and of the one inside it, so that their dropout differs."""


class Chunks(NamedTuple):
    """``seq``: the chunks as a sequence. ``token_BS``: which token begins each. ``real_BS``: False for slots without a chunk.

    ``begins_BT``: the tokens that begin a chunk. ``chunk_BT``: the slot that each token reads, ``reads_BT``: False where its
    document has none. ``n_dropped_B``: boundaries that found no slot.
    """

    seq: SequenceInfo
    token_BS: Tensor
    real_BS: Tensor
    begins_BT: Tensor
    chunk_BT: Tensor
    reads_BT: Tensor
    n_dropped_B: Tensor


def n_slots(n_tokens: int, capacity: float) -> int:
    """Slots for the chunks of ``n_tokens``, the share ``capacity`` of them rounded up."""
    rounded = -(-round(capacity * n_tokens, 6) // SLOT_MULTIPLE) * SLOT_MULTIPLE
    return min(n_tokens, int(rounded))


def find_chunks(p_BT: Tensor, seq: SequenceInfo, real_BT: Tensor | None, slots: int) -> Chunks:
    """Chunks begin where p is above 1/2, as far as there are slots: a boundary beyond them is none.

    ``real_BT``: False for tokens that only fill slots of the stage outside; None where all are real.
    """
    wanted_BT = p_BT > 0.5
    wanted_BT = wanted_BT if real_BT is None else wanted_BT & real_BT
    number_BT = wanted_BT.to(torch.int64).cumsum(1)
    slot_S = torch.arange(slots, device=p_BT.device)
    real_BS = slot_S < number_BT[:, -1:]
    token_BS = torch.searchsorted(number_BT, (slot_S + 1).expand(len(p_BT), slots).contiguous()).clamp(max=p_BT.shape[1] - 1)
    document_BS = torch.where(real_BS, seq.document_BT.gather(1, token_BS), seq.document_BT[:, -1:] + 1)
    chunk_BT = (number_BT.clamp(max=slots) - 1).clamp(min=0)
    reads_BT = document_BS.gather(1, chunk_BT) == seq.document_BT
    return Chunks(
        seq=seq.of_documents(document_BS, packed=True, seed_step=SEED_STEP),
        token_BS=token_BS,
        real_BS=real_BS,
        begins_BT=wanted_BT & (number_BT <= slots),
        chunk_BT=chunk_BT,
        reads_BT=reads_BT,
        n_dropped_B=(number_BT[:, -1] - slots).clamp(min=0),
    )


def gather_chunks(x_BTD: Tensor, chunks: Chunks) -> Tensor:
    """The token that begins each chunk, [B, S, D]; zero in slots without one."""
    return _rows(x_BTD, chunks.token_BS).masked_fill(~chunks.real_BS[..., None], 0)


def spread_chunks(z_BSD: Tensor, p_BT: Tensor, chunks: Chunks) -> Tensor:
    """What each token reads of the chunks, [B, T, D] in fp32 at least (equations 5, 8 and 9 of the paper).

    Chunks are averaged with those before them in their document, each weighed by its boundary's probability, and each token
    takes its chunk's average. The straight-through estimator multiplies it by 1, and hands its gradient to the probability
    of what was decided for the token: p where it begins a chunk, else 1 - p.
    """
    weight_BS = p_BT.gather(1, chunks.token_BS).clamp(LEAST_WEIGHT, MOST_WEIGHT)
    average_BSD = ema_scan(z_BSD, weight_BS, chunks.seq.position_BT == 0)
    read_BTD = _rows(average_BSD, chunks.chunk_BT).masked_fill(~chunks.reads_BT[..., None], 0)
    decided_BT = torch.where(chunks.begins_BT, p_BT, 1 - p_BT)
    return read_BTD + read_BTD.detach() * (decided_BT - decided_BT.detach())[..., None]


def _rows(x_BTD: Tensor, index_BS: Tensor) -> Tensor:
    """x[b, index[b, s]], [B, S, D]."""
    B, T, D = x_BTD.shape
    flat_N = (index_BS + T * torch.arange(B, device=index_BS.device)[:, None]).flatten()
    return x_BTD.flatten(0, 1).index_select(0, flat_N).view(B, -1, D)
