"""Run the configured evaluators on a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from titanarch.config.errors import ConfigError, Problem
from titanarch.contract.model import Model
from titanarch.data.config import DataConfig
from titanarch.data.fixed import documents, fixed_batches
from titanarch.data.tokenizers import Tokenizer
from titanarch.evaluate.config import EvaluationConfig
from titanarch.evaluate.evaluator import EVALUATORS, MAIN_TABLE, Row, Subject
from titanarch.evaluate.forward import Ranks, Reduce
from titanarch.evaluate.ngram import Ngrams, count_ngrams
from titanarch.evaluate.windows import Documents

BASELINE_ROWS = 256
"""Rows that the baselines read at once."""


@dataclass(frozen=True)
class EvaluationResult:
    """What was measured: tables by name, each a list of flat rows; the same on every process."""

    tables: Mapping[str, tuple[Row, ...]]
    data_fingerprint: str
    """A hash of the validation documents: results with different ones are not comparable."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The main table: a row for each rule and context length."""
        return [dict(row) for row in self.tables.get(MAIN_TABLE, ())]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain lists and mappings."""
        tables = {name: [dict(row) for row in rows] for name, rows in self.tables.items()}
        return {"data_fingerprint": self.data_fingerprint, **tables}


def evaluate(
    model: Model,
    *,
    config: EvaluationConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    train_seq_len: int,
    device: torch.device,
    dp_rank: int,
    dp_degree: int,
    reduce: Reduce,
) -> EvaluationResult:
    """Measure ``model`` on the validation documents. Collective: every process calls it and gets the same result.

    ``train_seq_len``: tokens of a training row, the context length where none is configured. ``reduce`` sums over
    the data-parallel processes. Host memory: 4 bytes a target that is scored. A length that the model cannot read,
    or no document fills, is a row with a note. Raises DataError where there are no validation documents.
    """
    held_out = documents(data, "validation", tokenizer)
    subject = Subject(
        model=model,
        documents=Documents(held_out, tokenizer),
        tokenizer=tokenizer,
        lengths=config.lengths or (train_seq_len,),
        max_tokens=config.max_tokens,
        batch_tokens=config.batch_tokens,
        train_seq_len=train_seq_len,
        device=device,
        ranks=Ranks(dp_rank, dp_degree, reduce),
        ngrams=_ngrams(config, data, tokenizer, train_seq_len) if config.baselines else None,
    )
    tables: dict[str, list[Row]] = {}
    for component in config.evaluators:
        for name, row in EVALUATORS.of(component)(component).run(subject):
            tables.setdefault(name, []).append(row)
    return EvaluationResult({name: tuple(rows) for name, rows in tables.items()}, held_out.fingerprint)


def require_readable(model: Model, lengths: tuple[int, ...]) -> None:
    """Raises ConfigError where somebody asks for a length that the model cannot read."""
    longest = model.max_length()
    too_long = [length for length in lengths if longest is not None and length > longest]
    if too_long:
        shown = ", ".join(map(str, too_long))
        raise ConfigError(
            Problem(f"{shown}: the model's position table has {longest} rows; ask for at most that", key="evaluation.lengths")
        )


def _ngrams(config: EvaluationConfig, data: DataConfig, tokenizer: Tokenizer, seq_len: int) -> Ngrams | None:
    """Every process counts for itself, which takes a second for a few million tokens."""
    batches = fixed_batches(
        data,
        "train",
        tokenizer=tokenizer,
        seq_len=seq_len,
        n_rows=-(-config.baseline_tokens // seq_len),
        batch_size=BASELINE_ROWS,
        dp_rank=0,
        dp_degree=1,
    )
    return count_ngrams(batches, vocab_size=tokenizer.vocab_size, max_tokens=config.baseline_tokens)
