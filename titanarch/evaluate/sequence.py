"""From a batch of the loader to what a model may know of its tokens."""

import torch

from titanarch.contract.sequence import SequenceInfo
from titanarch.data.batch import Batch


def sequence_of(batch: Batch, *, seed: int | None) -> SequenceInfo:
    """The tokens of ``batch``, whole rows on this process, on the batch's device.

    ``seed``: of the random draws in training (dropout, start augmentation); None where nothing is drawn.
    """
    length = batch.tokens_BT.shape[1]
    return SequenceInfo(
        position_BT=batch.position_BT,
        document_BT=batch.document_BT,
        index_T=torch.arange(length, device=batch.tokens_BT.device),
        row_B=batch.row_B,
        length=length,
        seed=seed,
        packed=batch.packed,
        cu_seqlens=batch.cu_seqlens,
    )
