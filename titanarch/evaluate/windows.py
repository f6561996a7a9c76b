"""Which targets of the validation documents are scored at a context length, and what the model reads for each.

A window shows the model L tokens of one document, position 0 at its first token, and scores its last R targets.
Separators between documents are neither shown nor scored.

Shapes: W windows, L tokens a window, R most scored targets of a window, N documents, B rows of a batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from titanarch.data.batch import IGNORED
from titanarch.data.indexed import IndexedData
from titanarch.data.tokenizers import Tokenizer


class Documents:
    """Tokenized documents, by number and place in the document."""

    def __init__(self, data: IndexedData, tokenizer: Tokenizer) -> None:
        self._data = data
        self._starts = np.asarray(data.starts, dtype=np.int64)
        self.lengths_N = np.maximum(np.diff(self._starts) - (tokenizer.eos_id is not None), 0)
        """Tokens of each, without the one that ends it."""
        self.fingerprint = data.fingerprint

    def read(self, document: int, first: int, n_tokens: int) -> np.ndarray:
        """Tokens ``first`` to ``first + n_tokens`` of a document, in the stored dtype."""
        assert 0 <= first <= self.lengths_N[document] - n_tokens, "a window lies in one document"
        return self._data.read(int(self._starts[document]) + first, n_tokens)


@dataclass(frozen=True, eq=False)
class ScoredWindows:
    """Window w shows tokens end - L to end - 1 of its document; its last ``n_scored_W`` targets end with token ``end_W``.

    ``rule``: which targets they are. ``length``: L. All arrays int64.
    """

    rule: str
    length: int
    document_W: np.ndarray
    end_W: np.ndarray
    n_scored_W: np.ndarray

    def __len__(self) -> int:
        return len(self.end_W)

    @property
    def width(self) -> int:
        """R."""
        return int(self.n_scored_W.max())

    @property
    def scored_WR(self) -> np.ndarray:
        """Whether a place of the right-aligned targets [W, R] is scored, bool."""
        return np.arange(self.width) >= self.width - self.n_scored_W[:, None]

    def targets(self, documents: Documents) -> np.ndarray:
        """The right-aligned targets and, first, the token before them: int64 [W, R + 1]."""
        tokens = np.empty((len(self), self.width + 1), dtype=np.int64)
        for row, (document, end) in enumerate(zip(self.document_W.tolist(), self.end_W.tolist(), strict=True)):
            tokens[row] = documents.read(document, end - self.width, self.width + 1)
        return tokens

    def batch(self, documents: Documents, window_B: np.ndarray, n_rows: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels [n_rows, L] of the windows ``window_B``; rows beyond them have no target."""
        tokens_BS = np.zeros((n_rows, self.length + 1), dtype=np.int64)
        labels_BT = np.full((n_rows, self.length), IGNORED, dtype=np.int64)
        for row, window in enumerate(window_B.tolist()):
            end, scored = int(self.end_W[window]), int(self.n_scored_W[window])
            tokens_BS[row] = documents.read(int(self.document_W[window]), end - self.length, self.length + 1)
            labels_BT[row, -scored:] = tokens_BS[row, -scored:]
        return torch.from_numpy(tokens_BS[:, :-1].copy()), torch.from_numpy(labels_BT)


def spread(n_there: int, n_wanted: int) -> np.ndarray:
    """``n_wanted`` numbers below ``n_there``, spread evenly, or all of them if they are fewer; int64."""
    n = min(n_there, n_wanted)
    return np.arange(n) * n_there // max(n, 1)


def _pieces(n_pieces_N: np.ndarray, n_wanted: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Document and number in it of pieces, of which document i has ``n_pieces_N[i]``; ``n_wanted`` of them, None: all."""
    ends_N = np.cumsum(n_pieces_N)
    piece_P = spread(int(ends_N[-1]), n_wanted or int(ends_N[-1]))
    document_P = np.searchsorted(ends_N, piece_P, side="right")
    return document_P, piece_P - (ends_N - n_pieces_N)[document_P]


def whole_windows(lengths_N: np.ndarray, length: int, max_tokens: int) -> ScoredWindows:
    """Documents cut from their start into whole windows of ``length`` tokens, every target of them scored.

    ``max_tokens``: at most so many targets, whole windows spread evenly over all, but at least one; 0: all windows.
    """
    n_wanted = max(1, max_tokens // length) if max_tokens else None
    document_W, number_W = _pieces(windows_of(lengths_N, length), n_wanted)
    end_W = (number_W + 1) * length
    return ScoredWindows("all_positions", length, document_W, end_W, np.full_like(end_W, length))


def same_target_windows(lengths_N: np.ndarray, length: int, longest: int, max_tokens: int) -> ScoredWindows:
    """ScoredWindows of ``length`` tokens over targets that depend on ``longest`` alone.

    The targets: tokens ceil(longest / 2) + 1 and up of every document, in whole blocks of ceil(longest / 2); with
    ``max_tokens``, blocks spread evenly over all, at most so many targets but at least one block. Each block is
    divided, for every length alike from its start, among windows that score their last ceil(length / 2) targets, the
    last one what is left; so a target is predicted from more than length / 2 and at most ``length`` tokens before it.
    """
    block, step = -(-longest // 2), -(-length // 2)
    n_wanted = max(1, max_tokens // block) if max_tokens else None
    document_P, number_P = _pieces(blocks_of(lengths_N, longest), n_wanted)
    before_P = (number_P + 1) * block  # the last token before each block
    scored_to_Q = np.minimum(np.arange(step, block + step, step), block)  # targets of a block up to each window's end
    end_W = (before_P[:, None] + scored_to_Q).ravel()
    n_scored_W = np.tile(np.diff(scored_to_Q, prepend=0), len(before_P))
    return ScoredWindows("same_targets", length, np.repeat(document_P, len(scored_to_Q)), end_W, n_scored_W)


def blocks_of(lengths_N: np.ndarray, longest: int) -> np.ndarray:
    """How many blocks of targets each document has under the rule of ``same_target_windows``: int64 [N]."""
    block = -(-longest // 2)
    return np.maximum(lengths_N - 1 - block, 0) // block


def windows_of(lengths_N: np.ndarray, length: int) -> np.ndarray:
    """How many whole windows each document has, with the target after the last token: int64 [N]."""
    return np.maximum(lengths_N - 1, 0) // length
