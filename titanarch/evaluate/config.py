"""The sections [validation] and [evaluation]."""

from typing import Annotated

from pydantic import Field, field_validator

from titanarch.config.errors import ConfigError, Problem
from titanarch.config.section import ListOf, Section
from titanarch.data.config import DataConfig
from titanarch.data.split import has_validation
from titanarch.evaluate.context_lengths import AllPositionsConfig, SameTargetsConfig
from titanarch.evaluate.evaluator import EVALUATORS, EvaluatorConfig
from titanarch.evaluate.positions import PositionsConfig

Positive = Annotated[int, Field(ge=1)]


class ValidationConfig(Section, identity=False):
    """The loss on fixed rows during training, nothing drawn at random."""

    enable: bool = Field(True, description="measure the loss on rows of the validation split while training")
    interval: Positive = Field(500, description="steps between two measurements")
    rows: Positive = Field(64, description="rows of training.seq_len tokens of the validation split, spread evenly over it")
    train_rows: int = Field(64, ge=0, description="rows of the training split measured the same way, for the generalization gap; 0: none")


class EvaluationConfig(Section, identity=False):
    """What is measured on the validation documents at the end of training, and by ``titanarch eval``."""

    enable: bool = Field(True, description="evaluate at the end of training")
    lengths: ListOf[Positive] = Field((), description="context lengths, tokens; empty: training.seq_len alone")
    max_tokens: int = Field(65_536, ge=0, description="targets a length and rule, in whole windows spread over the split; 0: all")
    batch_tokens: Positive = Field(16_384, description="tokens a forward of one process, at least one row; bounds the memory")
    evaluators: ListOf[Annotated[EvaluatorConfig, EVALUATORS]] = Field(
        default_factory=lambda: (AllPositionsConfig(), SameTargetsConfig(), PositionsConfig()), description="what is measured"
    )
    baselines: bool = Field(True, description="add the losses of a unigram and a Kneser-Ney bigram model on the same targets")
    baseline_tokens: Positive = Field(10_000_000, description="training tokens that the baselines count, at most")

    @field_validator("lengths")
    @classmethod
    def _each_once(cls, lengths: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(lengths)) < len(lengths):
            raise ValueError("a length is given twice; give each once")
        return lengths


def check_splits(data: DataConfig, *, validation: ValidationConfig, evaluation: EvaluationConfig) -> None:
    """Raises ConfigError where something is to be measured on a validation split and the data have none."""
    if has_validation(data):
        return
    remedy = "set data.validation_fraction, give a source in [data.validation], or set this to false"
    wanted = {"validation.enable": validation.enable, "evaluation.enable": evaluation.enable}
    problems = [Problem(f"the data hold no documents out for it: {remedy}", key=key) for key, on in wanted.items() if on]
    if problems:
        raise ConfigError(*problems)
