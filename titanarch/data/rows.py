"""Indexed rows: windows of the documents laid end to end, in a new seeded order each epoch.

Shapes: B rows, T tokens a row, S = T + 1 tokens of a window, W windows.
"""

import numpy as np

from titanarch.config.errors import ConfigError, Problem
from titanarch.data.batch import IGNORED, Batch, Windows
from titanarch.data.indexed import IndexedData
from titanarch.data.permutation import Permutation

ORDER_CHUNK = 1024  # rows whose windows are computed at once: far less work a row than one by one


class IndexedRows:
    """Row k of a run: window ``permutation(k mod W)`` of the W windows, the permutation that of epoch k // W.

    Window w holds tokens w * T to w * T + T, so the last token of a window, a target, is the first of the next.
    What is left at the end, less than a window, is not trained on. Raises ConfigError where there is no window.
    """

    def __init__(self, data: IndexedData, *, seq_len: int, seed: int) -> None:
        self.data = data
        self.seq_len = seq_len
        self.seed = seed
        self.n_windows = (data.n_tokens - 1) // seq_len
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        if self.n_windows < 1:
            raise ConfigError(
                Problem(
                    f"the training data have {data.n_tokens} tokens, too few for one row of {seq_len} and its last target: "
                    "give more data or a smaller training.seq_len",
                    key="training.seq_len",
                )
            )

    def windows(self, first_row: int, n_rows: int) -> np.ndarray:
        """The windows of rows ``first_row`` to ``first_row + n_rows``, int64 [n_rows]."""
        parts = []
        row, end = first_row, first_row + n_rows
        while row < end:
            chunk, place = divmod(row, ORDER_CHUNK)
            part = self._chunk(chunk)[place : place + end - row]
            parts.append(part)
            row += len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _chunk(self, chunk: int) -> np.ndarray:
        if self._order[0] != chunk:
            epoch_W, index_W = np.divmod(np.arange(chunk * ORDER_CHUNK, (chunk + 1) * ORDER_CHUNK), self.n_windows)
            for epoch in np.unique(epoch_W):
                permutation = Permutation(self.n_windows, seed=self.seed, epoch=int(epoch))
                index_W[epoch_W == epoch] = permutation(index_W[epoch_W == epoch])
            self._order = (chunk, index_W)
        return self._order[1]

    def read(self, first_row: int, n_rows: int) -> Windows:
        """Rows ``first_row`` to ``first_row + n_rows``."""
        row_B = np.arange(first_row, first_row + n_rows)
        return read_windows(self.data, self.windows(first_row, n_rows), row_B=row_B, seq_len=self.seq_len)


def read_windows(data: IndexedData, window_B: np.ndarray, *, row_B: np.ndarray, seq_len: int) -> Windows:
    """The windows ``window_B`` of ``data`` as the rows numbered ``row_B``, both int64 [B].

    A window past the last whole one is filled up with token 0; what fills it begins as another document would.
    """
    start_B = window_B * seq_len
    tokens_BS = data.windows(start_B, seq_len + 1)
    starts = data.starts
    first_B, end_B = starts.searchsorted(start_B, side="right"), starts.searchsorted(start_B + seq_len, side="right")
    count_B = end_B - first_B
    start_row_E = np.repeat(np.arange(len(window_B)), count_B)
    document_E = np.arange(len(start_row_E)) + np.repeat(first_B - (np.cumsum(count_B) - count_B), count_B)
    return Windows(tokens_BS, start_row_E, starts[document_E] - start_B[start_row_E], row_B)


def mask_past_end(batch: Batch, windows_end_B: np.ndarray) -> Batch:
    """``batch`` without the targets past the end of the data: row b has ``windows_end_B[b]`` tokens that are real."""
    for row, n_real in enumerate(windows_end_B.tolist()):
        batch.labels_BT[row, max(0, n_real - 1) :] = IGNORED
    return batch
