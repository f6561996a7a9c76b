"""How far two outcomes are apart."""

import math
from dataclasses import dataclass

import numpy as np

from tests.parity.trial import Outcome

LEAST_SHARE = 1e-3
"""A tensor's differences count against at least this share of the root mean square of all gradients.

Some true gradients are 0 (of key biases, of what shifts all logits of a softmax), so a plain ratio means nothing there.
"""


@dataclass(frozen=True)
class Difference:
    """``loss``: the largest of a step, relative. ``gradient``: the largest of a tensor, by the measure, and ``where`` it is."""

    loss: float
    gradient: float
    where: str

    @property
    def largest(self) -> float:
        return max(self.loss, self.gradient)


def difference(found: Outcome, expected: Outcome) -> Difference:
    """The largest differences of ``found``; infinite where something is missing or not a number."""
    if found.gradients.keys() != expected.gradients.keys() or len(found.losses) != len(expected.losses):
        missing = sorted(found.gradients.keys() ^ expected.gradients.keys())
        return Difference(math.inf, math.inf, f"only on one side: {', '.join(missing[:3])}")
    loss = max(_not_nan(abs(a - b) / abs(b)) for a, b in zip(found.losses, expected.losses, strict=True))
    squares = [np.square(g.astype(np.float64)) for g in expected.gradients.values()]
    rms = math.sqrt(sum(float(s.sum()) for s in squares) / sum(s.size for s in squares))
    by_name = {
        name: _not_nan(float(np.abs(found.gradients[name] - g).max()) / max(float(np.abs(g).max()), LEAST_SHARE * rms))
        for name, g in expected.gradients.items()
    }
    where = max(by_name, key=lambda name: by_name[name])
    return Difference(loss, by_name[where], where)


def _not_nan(x: float) -> float:
    return math.inf if math.isnan(x) else x
