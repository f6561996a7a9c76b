"""How the loss depends on the position in the context, at the longest length.

Shapes: W windows, T positions of a window, S statistics, N documents, K resamples.
"""

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from titanarch.evaluate.evaluator import Evaluator, EvaluatorConfig, Row, Subject, evaluator
from titanarch.evaluate.windows import whole_windows

EARLY, LATE, AROUND = 50, 500, 10
"""The positions whose losses the ICL score compares, and how many on each side are averaged with them."""
ICL_LENGTH = 512
"""The shortest context that has an ICL score, tokens."""


class PositionsConfig(EvaluatorConfig):
    """Loss by position, in-context learning (ICL) score and slope past the training length, at the longest length."""

    bins_per_octave: int = Field(2, ge=1, description="bins of the loss by position for each doubling of the position")
    resamples: int = Field(1000, ge=1, description="resamples of the documents behind each 95 % interval")


@evaluator("positions")
class Positions(Evaluator):
    """Over the windows of ``all_positions`` at the longest length that can be measured; position 0 sees one token.

    Table ``loss_by_position``: mean loss of positions ``first`` to ``last``. Table ``position_scores``: ``icl_score``,
    loss(500) - loss(50), each the mean of 21 positions, in nats, lower is better; ``extrapolation_slope``, the
    least-squares slope of the loss on the position from the training length on, in nats a 1,000 tokens. Intervals
    are percentiles of a bootstrap that draws documents, since windows of one document are not independent.
    """

    Config = PositionsConfig
    config: PositionsConfig

    def run(self, subject: Subject) -> Iterator[tuple[str, Row]]:
        readable = [length for length in subject.lengths if not subject.why_not(length)]
        if not readable:
            reason = subject.why_not(min(subject.lengths))
            yield "position_scores", {"score": "all", "length": min(subject.lengths), "note": f"skipped: {reason}"}
            return
        length = max(readable)
        windows = whole_windows(subject.documents.lengths_N, length, subject.max_tokens)
        losses_WT = subject.losses(windows)
        edges = log_edges(length, self.config.bins_per_octave)
        by_bin = self._intervals(losses_WT, _bin_weights(edges, length), windows.document_W)
        for (first, end), (mean, bounds) in zip(edges, by_bin, strict=True):
            yield "loss_by_position", {"first": first, "last": end - 1, "loss": mean, **bounds, "count": (end - first) * len(windows)}
        scores = {"icl_score": icl_weights(length), "extrapolation_slope": slope_weights(subject.train_seq_len, length)}
        for score, weight_T in scores.items():
            if isinstance(weight_T, str):
                yield "position_scores", {"score": score, "length": length, "note": f"skipped: {weight_T}"}
            else:
                ((mean, bounds),) = self._intervals(losses_WT, weight_T[:, None], windows.document_W)
                yield "position_scores", {"score": score, "length": length, "value": mean, **bounds}

    def _intervals(self, losses_WT: np.ndarray, weight_TS: np.ndarray, document_W: np.ndarray) -> list[tuple[float, dict[str, float]]]:
        """Mean over windows of each linear statistic of the losses by position, and its 95 % interval, if it has one."""
        statistic_WS = losses_WT.astype(np.float64) @ weight_TS
        means_S = statistic_WS.mean(axis=0).tolist()
        bounds = bootstrap(statistic_WS, document_W, self.config.resamples)
        if bounds is None:
            return [(mean, {}) for mean in means_S]
        low_S, high_S = bounds
        return [(mean, {"low_95": low, "high_95": high}) for mean, low, high in zip(means_S, low_S.tolist(), high_S.tolist(), strict=True)]


def log_edges(length: int, per_octave: int) -> list[tuple[int, int]]:
    """Positions 0 to ``length`` in bins [first, end) whose ends grow by a factor, each at least one position."""
    ends: list[int] = []
    n = 0
    while not ends or ends[-1] < length:
        end = min(round(2 ** (n / per_octave)), length)
        if not ends or end > ends[-1]:
            ends.append(end)
        n += 1
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _bin_weights(edges: list[tuple[int, int]], length: int) -> np.ndarray:
    weight_TS = np.zeros((length, len(edges)))
    for column, (first, end) in enumerate(edges):
        weight_TS[first:end, column] = 1 / (end - first)
    return weight_TS


def icl_weights(length: int) -> np.ndarray | str:
    """What the losses by position are multiplied by for the ICL score, fp64 [T]; why there is none, at a short length."""
    if length < ICL_LENGTH:
        return f"needs a context of {ICL_LENGTH} tokens"
    weight_T = np.zeros(length)
    weight_T[LATE - AROUND : LATE + AROUND + 1] = 1 / (2 * AROUND + 1)
    weight_T[EARLY - AROUND : EARLY + AROUND + 1] = -1 / (2 * AROUND + 1)
    return weight_T


def slope_weights(train_seq_len: int, length: int) -> np.ndarray | str:
    """What the losses by position are multiplied by for the slope past training, fp64 [T]; or why there is none."""
    if length < train_seq_len + 2:
        return f"needs a context longer than the {train_seq_len} tokens of training"
    position_T = np.arange(length - train_seq_len, dtype=np.float64)
    centered_T = position_T - position_T.mean()
    return np.concatenate([np.zeros(train_seq_len), 1000 * centered_T / (centered_T**2).sum()])


def bootstrap(statistic_WS: np.ndarray, document_W: np.ndarray, resamples: int) -> tuple[np.ndarray, np.ndarray] | None:
    """2.5th and 97.5th percentile [S] of the mean over windows when documents are drawn anew.

    None where there is one document, which says nothing about others.
    """
    _, document_W = np.unique(document_W, return_inverse=True)
    n_windows_N = np.bincount(document_W)
    if len(n_windows_N) < 2:
        return None
    sum_NS = np.zeros((len(n_windows_N), statistic_WS.shape[1]))
    np.add.at(sum_NS, document_W, statistic_WS)
    n = len(n_windows_N)
    drawn_KN = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples)
    mean_KS = (drawn_KN @ sum_NS) / (drawn_KN @ n_windows_N)[:, None]
    low_S, high_S = np.percentile(mean_KS, [2.5, 97.5], axis=0)
    return low_S, high_S
