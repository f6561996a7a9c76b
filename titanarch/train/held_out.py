"""What a run measures on rows that it does not train on: validation on its way, the evaluation at its end."""

from typing import Any

import torch

from titanarch.contract.model import Model
from titanarch.data.fixed import FixedBatches, fixed_batches
from titanarch.data.sources import Split
from titanarch.data.tokenizers import Tokenizer
from titanarch.evaluate.evaluation import evaluate
from titanarch.evaluate.validation import validation_loss
from titanarch.parallel.mesh import Mesh
from titanarch.train.run_config import RunConfig


class HeldOut:
    """Of one start of a run. All methods are collective."""

    def __init__(
        self, config: RunConfig, model: Model, *, tokenizer: Tokenizer, mesh: Mesh, device: torch.device, rows_at_once: int
    ) -> None:
        """``rows_at_once``: rows of a forward on each process."""
        self._config, self._model, self._tokenizer, self._mesh, self._device = config, model, tokenizer, mesh, device
        validation = config.validation
        wanted: dict[str, tuple[Split, int]] = {
            "validation_loss": ("validation", validation.rows),
            "train_subset_loss": ("train", validation.train_rows),
        }
        self.validation_sets: dict[str, FixedBatches] = {
            name: fixed_batches(
                config.data,
                split,
                tokenizer=tokenizer,
                seq_len=config.training.seq_len,
                n_rows=n_rows,
                batch_size=rows_at_once,
                dp_rank=mesh.data_rank,
                dp_degree=mesh.degrees.data_parallel,
            )
            for name, (split, n_rows) in wanted.items()
            if validation.enable and n_rows
        }
        self._measured: tuple[int, dict[str, float]] = (-1, {})
        """The step after which it validated last, and the losses."""

    def validate(self, step: int) -> dict[str, float]:
        """Losses on the fixed rows after ``step``, in nats a token; {} where validation is off."""
        losses = {
            name: validation_loss(self._model, batches, device=self._device, reduce=self._mesh.sum_over_data)[0]
            for name, batches in self.validation_sets.items()
        }
        self._measured = (step, losses)
        return losses

    def losses_after(self, step: int) -> dict[str, float]:
        """What was measured after ``step``; {} where nothing was."""
        return self._measured[1] if self._measured[0] == step else {}

    def forget(self) -> None:
        """The run has gone back, and its steps will be others."""
        self._measured = (-1, {})

    def evaluate(self) -> dict[str, Any]:
        """The tables of the evaluation as ``result.json`` holds them; empty where it is off."""
        if not self._config.evaluation.enable:
            return {}
        evaluation = evaluate(
            self._model,
            config=self._config.evaluation,
            data=self._config.data,
            tokenizer=self._tokenizer,
            train_seq_len=self._config.training.seq_len,
            device=self._device,
            dp_rank=self._mesh.data_rank,
            dp_degree=self._mesh.degrees.data_parallel,
            reduce=self._mesh.sum_over_data,
        )
        return {"evaluation": evaluation.rows, "evaluation_tables": evaluation.to_json()}
