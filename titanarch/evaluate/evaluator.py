"""What an evaluator is, and what it works on.

Shapes: W windows, T tokens of a window, R most scored targets of a window, B rows of a forward.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from titanarch.config.registry import ComponentConfig, Registry
from titanarch.contract.model import Model
from titanarch.contract.sequence import SequenceInfo
from titanarch.data.errors import DataError
from titanarch.data.tokenizers import Tokenizer
from titanarch.evaluate.forward import Ranks, evaluating, summed
from titanarch.evaluate.ngram import Ngrams
from titanarch.evaluate.windows import Documents, ScoredWindows, windows_of

logger = logging.getLogger(__name__)

Value = str | int | float
Row = Mapping[str, Value]


@dataclass(frozen=True)
class Subject:
    """A model and the validation documents that it is measured on.

    ``lengths``: context lengths asked for, tokens. ``max_tokens``: targets a measurement, 0 for all. ``batch_tokens``:
    tokens a forward of one process, or of those that share its rows, or one row if that is longer. ``train_seq_len``:
    longest row in training, tokens. ``ngrams``: the baselines, or None.
    """

    model: Model
    documents: Documents
    tokenizer: Tokenizer
    lengths: tuple[int, ...]
    max_tokens: int
    batch_tokens: int
    train_seq_len: int
    device: torch.device
    ranks: Ranks
    ngrams: Ngrams | None
    _known: dict[tuple[str, int], np.ndarray] = field(default_factory=dict, repr=False)

    def why_not(self, length: int) -> str:
        """Why rows of ``length`` tokens cannot be measured; empty where they can."""
        if "scoring_windows" in self.model.refuses:
            return self.model.refuses["scoring_windows"]
        longest = self.model.max_length()
        if longest is not None and length > longest:
            return f"the model reads at most {longest} tokens"
        if not windows_of(self.documents.lengths_N, length).any():
            return f"no validation document has more than {length} tokens"
        return ""

    def losses(self, windows: ScoredWindows) -> np.ndarray:
        """Nats of the right-aligned targets of all windows, fp32 [W, R], the same on every process; 0 if not scored.

        Collective. The same rule and length are computed once.
        """
        key = (windows.rule, windows.length)
        if key not in self._known:
            logger.info("evaluating %d windows of %d tokens (%s)", len(windows), windows.length, windows.rule)
            self._known[key] = self._compute(windows)
        return self._known[key]

    def _compute(self, windows: ScoredWindows) -> np.ndarray:
        ranks, length, width = self.ranks, windows.length, windows.width
        n_rows = self._rows_at_once(length)
        losses_WR = np.zeros((len(windows), width), dtype=np.float32)
        with evaluating(self.model):
            # every process makes the same number of forwards of the same shape: under FSDP each one is collective
            for first in range(0, len(windows), n_rows * ranks.degree):
                own_B = np.arange(n_rows) + first + ranks.rank * n_rows
                own_B = own_B[own_B < len(windows)]
                tokens_BT, labels_BT = windows.batch(self.documents, own_B, n_rows)
                seq = SequenceInfo.whole(n_rows, length, device=self.device)
                losses_BT = self.model.token_losses(tokens_BT.to(self.device), seq, labels_BT.to(self.device))
                losses_WR[own_B] = losses_BT[: len(own_B), length - width :].float().cpu().numpy()
        if ranks.degree == 1:
            return losses_WR
        return summed(torch.from_numpy(losses_WR), device=self.device, reduce=ranks.reduce).numpy()

    def _rows_at_once(self, length: int) -> int:
        """Rows of a forward, alike under all rules, since each new shape costs a compiled model a compilation."""
        n_windows = int(windows_of(self.documents.lengths_N, length).sum())
        if self.max_tokens:
            n_windows = min(n_windows, max(1, self.max_tokens // length))
        return min(max(1, self.batch_tokens // length), -(-n_windows // self.ranks.degree))

    def mean_row(self, windows: ScoredWindows) -> dict[str, Value]:
        """The means over all scored targets: loss, perplexity, bits per byte, the baselines' losses, and the counts."""
        scored_WR, targets = windows.scored_WR, windows.targets(self.documents)
        loss = float(self.losses(windows)[scored_WR].mean(dtype=np.float64))
        row: dict[str, Value] = {"rule": windows.rule, "length": windows.length, "loss": loss, "perplexity": exp(loss)}
        n_targets, n_bytes = int(scored_WR.sum()), self._bytes(targets[:, 1:][scored_WR])
        if n_bytes:
            row |= {"bits_per_byte": loss * n_targets / (math.log(2) * n_bytes), "bytes": n_bytes}
        row["targets"] = n_targets
        if self.ngrams is not None:
            previous, target = targets[:, :-1][scored_WR], targets[:, 1:][scored_WR]
            row["unigram_loss"] = float(self.ngrams.unigram_losses(target).mean())
            row["bigram_loss"] = float(self.ngrams.bigram_losses(previous, target).mean())
        return row

    def _bytes(self, ids: np.ndarray) -> int:
        """UTF-8 bytes of the text of ``ids``; 0 where the tokenizer cannot say, which is told."""
        try:
            return int(self.tokenizer.token_bytes(ids).sum())
        except DataError as error:
            logger.warning("no bits per byte: %s", error)
            return 0


def exp(loss: float) -> float:
    """The perplexity of a mean loss; infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else loss


class EvaluatorConfig(ComponentConfig):
    """The table of one evaluator."""


class Evaluator(ABC):
    """Measures one thing of a model."""

    Config: ClassVar[type[EvaluatorConfig]]

    def __init__(self, config: EvaluatorConfig) -> None:
        self.config = config

    @abstractmethod
    def run(self, subject: Subject) -> Iterator[tuple[str, Row]]:
        """Yield (name of a table, one row of it): flat mappings of plain values, the same on every process.

        All processes run it in step, since the model's forward is collective. What cannot be measured is a row whose
        ``note`` says why.
        """


EVALUATORS: Registry[Evaluator] = Registry("evaluator")
evaluator = EVALUATORS.register

MAIN_TABLE = "context_lengths"
"""The table that is shown at the end of a run."""


def skipped(rule: str, length: int, reason: str) -> Row:
    """The row of a measurement that cannot be made."""
    return {"rule": rule, "length": length, "note": f"skipped: {reason}"}
