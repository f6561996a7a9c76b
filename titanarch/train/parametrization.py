"""[optimizer] parametrization: what a model is at its width, when its settings were found at another."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from titanarch.config.errors import ConfigError, Problem
from titanarch.contract.growth import Growth
from titanarch.contract.model import MODELS, Model, ModelConfig
from titanarch.contract.width import KEY, maximal_update
from titanarch.models.flavors import INHERITED_BY_MIXERS
from titanarch.train.run_config import RunConfig

Table = dict[str, Any]


def widen(model: Model, config: RunConfig, vocab_size: int) -> dict[str, Growth] | None:
    """Apply the parametrization of ``config`` to its bare ``model`` on the meta device; None where it is the standard one.

    Raises ConfigError where the base model cannot be built, or is made of other parts.
    """
    if config.optimizer.parametrization == "standard":
        return None
    base = base_config(config.model, config.optimizer.mup_base)
    with torch.device("meta"):
        return maximal_update(model, MODELS.of(base)(base, vocab_size, config.training.seq_len))


def base_config(model: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """The [model] table with ``changes``, as if they had been written there."""
    table = _merged(_without_inherited(model.model_dump()), changes)
    try:
        base: ModelConfig = MODELS.resolve(table)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(Problem(f"this is no model: {reasons}", KEY)) from error
    return base


def _without_inherited(table: Table) -> Table:
    """``table`` without what each mixer has from it, so that a change reaches the mixers too."""
    inherited = [(key, table[key]) for key in INHERITED_BY_MIXERS if key in table]

    def bare(mixer: Any) -> Any:
        return {k: v for k, v in mixer.items() if (k, v) not in inherited} if isinstance(mixer, dict) else mixer

    one, several = table.get("mixer"), table.get("mixers")
    table = table if one is None else {**table, "mixer": bare(one)}
    return {**table, "mixers": {name: bare(mixer) for name, mixer in several.items()}} if isinstance(several, dict) else table


def _merged(table: Mapping[str, Any], changes: Mapping[str, Any]) -> Table:
    merged = dict(table)
    for key, value in changes.items():
        before = merged.get(key)
        merged[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, Mapping) else value
    return merged
