"""How far two outcomes are apart."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from tests.parity.trial import Outcome

LEAST_SHARE = 1e-3
"""A tensor's differences count against at least this share of the root mean square of all gradients."""
ZERO_SHARE = 1e-9
"""A gradient whose every element is below this share, in float64, is zero but for rounding."""


@dataclass(frozen=True)
class Difference:
    """``loss``: the largest of a step, relative. ``gradient``: the largest of a tensor, by the measure, and ``where`` it is.

    ``gradient_norm``: of all gradients as one vector, the norm of the difference over the norm.
    """

    loss: float
    gradient: float
    gradient_norm: float
    where: str


def root_mean_square(gradients: Mapping[str, np.ndarray]) -> float:
    """Of all elements of all tensors."""
    squares = [np.square(g.astype(np.float64)) for g in gradients.values()]
    return math.sqrt(sum(float(s.sum()) for s in squares) / sum(s.size for s in squares))


def zero_gradients(in_float64: Outcome) -> frozenset[str]:
    """The tensors whose true gradient is zero: key biases, and what shifts all logits of a softmax alike."""
    least = ZERO_SHARE * root_mean_square(in_float64.gradients)
    return frozenset(name for name, g in in_float64.gradients.items() if float(np.abs(g).max()) < least)


def difference(found: Outcome, expected: Outcome, zero: Collection[str] = ()) -> Difference:
    """The largest differences of ``found``; infinite where something is missing or not a number.

    ``zero``: tensors whose true gradient is zero. What they hold is rounding, whose size is that of the other gradients, so
    it counts against the root mean square of those.
    """
    if found.gradients.keys() != expected.gradients.keys() or len(found.losses) != len(expected.losses):
        missing = sorted(found.gradients.keys() ^ expected.gradients.keys())
        return Difference(math.inf, math.inf, math.inf, f"only on one side: {', '.join(missing[:3])}")
    loss = max(_not_nan(abs(a - b) / abs(b)) for a, b in zip(found.losses, expected.losses, strict=True))
    rms = root_mean_square(expected.gradients)
    by_name = {
        name: _not_nan(
            float(np.abs(found.gradients[name] - g).max()) / max(float(np.abs(g).max()), rms * (1 if name in zero else LEAST_SHARE))
        )
        for name, g in expected.gradients.items()
    }
    where = max(by_name, key=lambda name: by_name[name])
    differences = {name: found.gradients[name].astype(np.float64) - g for name, g in expected.gradients.items()}
    return Difference(loss, by_name[where], _not_nan(root_mean_square(differences) / rms), where)


def _not_nan(x: float) -> float:
    return math.inf if math.isnan(x) else x
