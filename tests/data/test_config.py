from typing import Any

import pytest
from pydantic import ValidationError

from titanarch.data.config import DataConfig
from titanarch.data.split import has_validation

JSONL = {"kind": "jsonl", "paths": ["a.jsonl"]}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"source": JSONL, "validation": "corpus", "validation_fraction": 0.1}, "not both"),
        ({"validation_fraction": 0.1}, "'corpus' says itself what is validation"),
        ({"source": {"kind": "tokens", "path": "x"}, "validation_fraction": 0.1}, "when preparing the tokens"),
        ({"source": {"kind": "tokens", "path": "x"}, "mode": "streamed"}, "read in indexed mode"),
        ({"streams": 4}, "in streamed mode alone"),
        ({"source": {"kind": "jsonl", "paths": []}}, "at least 1 item"),
        ({"validation_fraction": 1.0}, "less than 1"),
    ],
)
def test_combinations_that_mean_nothing(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(table)


def test_which_configurations_validate() -> None:
    assert has_validation(DataConfig())
    assert not has_validation(DataConfig.model_validate({"source": JSONL}))
    assert has_validation(DataConfig.model_validate({"source": JSONL, "validation": "corpus"}))
    assert has_validation(DataConfig.model_validate({"source": JSONL, "validation_fraction": 0.5}))


def test_what_may_change_when_a_run_resumes() -> None:
    free = {name for name in DataConfig.model_fields if not DataConfig.is_identity(name)}
    assert free == {"cache_dir", "workers", "processes"}
