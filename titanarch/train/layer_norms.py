"""The norms of the gradients by layer, of the last steps, for the report on a step that went wrong.

A step costs nothing but the memory of one number a parameter: clipping measures these norms anyhow, and they stay where they are, on
an accelerator too, until a report or a checkpoint wants them. Then they are added up by layer and over processes at once.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from titanarch.train.gradients import GradientClipper, Measured
from titanarch.train.guard import HISTORY_STEPS, MOST_UNCHECKED_STEPS
from titanarch.train.names import layer_of

_DIGITS = 6
"""Significant ones that are kept, as a float32 has about so many."""


class LayerNorms:
    """Of the parameters that ``clipper`` clips. Call ``add`` after each clipping, on all processes alike."""

    def __init__(self, model: nn.Module, clipper: GradientClipper) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._clipper = clipper
        self._layer_of = {id(p): layer_of(names[id(p)]) for group in clipper.groups.values() for p in group if id(p) in names}
        # In the order of the model, so that a table reads from its first layer to its last.
        self._layers = list(dict.fromkeys(self._layer_of[key] for key in names if key in self._layer_of))
        # On an accelerator a bad step may be found so many steps late.
        self._kept: deque[tuple[int, float, Measured]] = deque(maxlen=HISTORY_STEPS + MOST_UNCHECKED_STEPS)
        self._earlier: list[tuple[int, list[float]]] = []
        """Of steps before this start, by layer; the newest last."""

    def add(self, step: int, divide_by: float) -> None:
        """Keep what was measured in step number ``step``, of gradients that are ``divide_by`` times too large."""
        self._kept.append((step, divide_by, self._clipper.measured))

    def last(self, until: int | None = None) -> list[tuple[int, dict[str, float]]]:
        """Number and norms by layer of the last HISTORY_STEPS steps, up to number ``until`` unless it is None. Collective."""
        return [(step, dict(zip(self._layers, norms, strict=True))) for step, norms in self._last(until)]

    def state_dict(self) -> dict[str, Any]:
        """Collective. What is not finite is in words."""
        return {
            "layers": self._layers,
            "steps": [[step, [norm if abs(norm) < torch.inf else str(norm) for norm in norms]] for step, norms in self._last(None)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; one of another model's layers leaves nothing."""
        self._kept.clear()
        same = state["layers"] == self._layers
        self._earlier = [(step, [float(norm) for norm in norms]) for step, norms in state["steps"]] if same else []

    def _last(self, until: int | None) -> list[tuple[int, list[float]]]:
        kept = [each for each in self._kept if until is None or each[0] <= until][-HISTORY_STEPS:]
        earlier = [each for each in self._earlier if until is None or each[0] <= until]
        steps = [step for step, _, _ in kept]
        return [*earlier, *zip(steps, self._by_layer(kept), strict=True)][-HISTORY_STEPS:]

    def _by_layer(self, kept: list[tuple[int, float, Measured]]) -> list[list[float]]:
        """A row a step. Collective where there is one."""
        if not kept or not self._layers:
            return [[] for _ in kept]
        squares: dict[tuple[str, ...], Tensor] = {}
        for axes, parameters in self._clipper.groups.items():
            norms = torch.stack([_whole(*measured[axes], len(parameters)).double() / divide_by for _, divide_by, measured in kept])
            known = [place for place, parameter in enumerate(parameters) if id(parameter) in self._layer_of]
            layers = [self._layers.index(self._layer_of[id(parameters[place])]) for place in known]
            total = norms.new_zeros(len(kept), len(self._layers))
            squares[axes] = total.index_add_(1, torch.tensor(layers, device=norms.device), norms[:, known].square())
        rows: list[list[float]] = self._clipper.sum_over_processes(squares).sqrt_().tolist()
        return [[float(f"{norm:.{_DIGITS}g}") for norm in row] for row in rows]


def _whole(norms: Tensor, places: list[int] | None, count: int) -> Tensor:
    """One number for each of ``count`` parameters, of which those at ``places`` had gradients; None: all had."""
    if places is None:
        return norms
    whole = norms.new_zeros(count)
    whole[places] = norms
    return whole
