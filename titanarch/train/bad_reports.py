"""``reports/step-N.json``: what can be known of a step whose gradient was not finite, or a spike."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titanarch.checkpoint.processes import Processes
from titanarch.data.batch import Batch
from titanarch.data.tokenizers import Tokenizer
from titanarch.train.guard import BadStep
from titanarch.train.inspection import Inspection, inspect
from titanarch.train.metrics.files import write_json, writing
from titanarch.train.step import TrainStep

FOLDER = "reports"
SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class StepRows:
    """The rows of a step of the whole run, by number: ``first`` to ``last``."""

    step: int
    first: int
    last: int


def decoded_rows(batches: Iterable[Batch], tokenizer: Tokenizer) -> dict[int, str]:
    """The beginning of the text of each row of this process, by its number."""
    return {
        row: tokenizer.decode(np.asarray(tokens))[:SHOWN_CHARACTERS]
        for batch in batches
        for row, tokens in zip(batch.row_B.tolist(), batch.tokens_BT.tolist(), strict=True)
    }


def inspected(inspection: Inspection) -> dict[str, Any]:
    """What the report says of a step that was made again."""
    return {
        "loss": _number(inspection.loss),
        "grad_norm": _number(inspection.norm),
        "norms_by_layer": {layer: _number(norm) for layer, norm in inspection.norms.items()},
        "first_module_not_finite_forward": None if inspection.forward is None else asdict(inspection.forward),
        "first_module_not_finite_backward": inspection.first_backward,
        "gradients_not_finite": list(inspection.parameters),
    }


class BadStepReports:
    """Writes the reports of a run into its folder."""

    def __init__(self, folder: Path, train_step: TrainStep, tokenizer: Tokenizer, processes: Processes) -> None:
        self._folder = folder / FOLDER
        self._train_step, self._tokenizer, self._processes = train_step, tokenizer, processes

    def write(self, bad: BadStep, rows: StepRows | None, batches: Sequence[Batch]) -> Path | None:
        """Write what is known of ``bad``; the path on process 0. Collective where ``bad.is_shared``.

        The step is made again on ``batches``, this process's, for which the weights must be those of before its update:
        where ``bad`` is late, or all processes are not here, the report leaves out what that would tell.
        """
        report = self._known(bad, rows)
        if bad.is_shared:
            report["last_norms_by_layer"] = [
                {"step": step, "norms": {layer: _number(norm) for layer, norm in norms.items()}}
                for step, norms in self._train_step.layer_norms.last(bad.step)
            ]
        if bad.is_shared and not bad.is_late:
            report |= inspected(inspect(self._train_step, batches, self._processes))
            texts = self._processes.gather(decoded_rows(batches, self._tokenizer))
            report["text"] = {str(row): text for row, text in sorted(item for each in texts for item in each.items())}
        elif bad.is_late:
            report["note"] = "found after the update, since nothing waits for the accelerator: titanarch replay makes the step again"
        else:
            report["note"] = f"only process {self._processes.rank} had a loss that is not finite: titanarch replay makes the step again"
        if bad.is_shared and self._processes.rank != 0:
            return None
        path = self._folder / f"step-{bad.step}.json"
        with writing(path):
            self._folder.mkdir(exist_ok=True)
        write_json(path, report)
        return path

    def _known(self, bad: BadStep, rows: StepRows | None) -> dict[str, Any]:
        history: list[Mapping[str, Any]] = [
            {"step": step, "grad_norm": _number(norm)} for step, norm in self._train_step.guard.history if step <= bad.step
        ]
        return {
            "step": bad.step,
            "what": bad.kind,
            "action": bad.action,
            "message": str(bad),
            "norm": _number(bad.norm),
            "threshold": _number(bad.threshold),
            "first_row": None if rows is None else rows.first,
            "last_row": None if rows is None else rows.last,
            "last_norms": history,
        }


def _number(value: float) -> float | str:
    """JSON has no infinities; a report should tell them from what is not a number."""
    return value if np.isfinite(value) else str(value)
