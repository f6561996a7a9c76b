"""Loss, perplexity and bits per byte at each context length, under two rules; perplexities of one rule are comparable.

``all_positions`` lets every target count, so at a short length more of them have little context. ``same_targets``
scores the same targets at every length, so that lengths are compared on nothing but the context.
"""

from collections.abc import Iterator

import numpy as np

from titanarch.evaluate.evaluator import MAIN_TABLE, Evaluator, EvaluatorConfig, Row, Subject, evaluator, exp, skipped
from titanarch.evaluate.windows import blocks_of, same_target_windows, whole_windows


class AllPositionsConfig(EvaluatorConfig):
    """The position study's rule: documents cut into whole windows, every position of a window scored."""


@evaluator("all_positions")
class AllPositions(Evaluator):
    """``perplexity`` is exp of the mean loss; ``mean_window_perplexity`` the mean over windows of exp of their mean loss."""

    Config = AllPositionsConfig

    def run(self, subject: Subject) -> Iterator[tuple[str, Row]]:
        for length in subject.lengths:
            if reason := subject.why_not(length):
                yield MAIN_TABLE, skipped("all_positions", length, reason)
                continue
            windows = whole_windows(subject.documents.lengths_N, length, subject.max_tokens)
            loss_W = subject.losses(windows).mean(axis=1, dtype=np.float64)
            row = subject.mean_row(windows)
            yield MAIN_TABLE, row | {"mean_window_perplexity": float(np.mean([exp(loss) for loss in loss_W.tolist()]))}


class SameTargetsConfig(EvaluatorConfig):
    """The same targets at every length, each predicted from more than half the length and at most all of it."""


@evaluator("same_targets")
class SameTargets(Evaluator):
    """The longest length asked for that a document can fill decides the targets, whether the model can read it or not.

    So models that stop at different lengths are compared on the same targets; see ``same_target_windows``.
    """

    Config = SameTargetsConfig

    def run(self, subject: Subject) -> Iterator[tuple[str, Row]]:
        lengths_N = subject.documents.lengths_N
        longest = max((length for length in subject.lengths if blocks_of(lengths_N, length).any()), default=0)
        for length in subject.lengths:
            reason = subject.why_not(length)
            if length > longest and not reason:  # an odd length needs a token more
                reason = f"no validation document has more than {length + 1} tokens"
            if reason:
                yield MAIN_TABLE, skipped("same_targets", length, reason)
            else:
                yield MAIN_TABLE, subject.mean_row(same_target_windows(lengths_N, length, longest, subject.max_tokens))
