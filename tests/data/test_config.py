from typing import Any

import pytest
from pydantic import ValidationError

from titanarch.config.dump import to_table
from titanarch.data.config import DataConfig
from titanarch.data.sources import MixtureConfig
from titanarch.data.split import has_validation

JSONL = {"kind": "jsonl", "paths": ["a.jsonl"]}


def mixture(*sources: Any, **more: Any) -> dict[str, Any]:
    return {"kind": "mixture", "sources": [{"source": source, "weight": 1.0, **more} for source in sources]}


def scheduled(schedule: list[list[float]]) -> dict[str, Any]:
    return {"kind": "mixture", "sources": [{"source": "corpus", "schedule": schedule}]}


MIXTURE = mixture("corpus")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"source": JSONL, "validation": "corpus", "validation_fraction": 0.1}, "not both"),
        ({"validation_fraction": 0.1}, "'corpus' says itself what is validation"),
        ({"source": {"kind": "tokens", "path": "x"}, "validation_fraction": 0.1}, "when preparing the tokens"),
        ({"source": {"kind": "tokens", "path": "x"}, "mode": "streamed"}, "read in indexed mode"),
        ({"streams": 4}, "in streamed mode alone"),
        ({"shuffle_documents": 4}, "indexed rows are shuffled already"),
        (
            {"source": mixture("corpus", {"kind": "tokens", "path": "x"}), "mode": "streamed"},
            "prepared tokens are read in indexed mode; all",
        ),
        ({"source": MIXTURE, "mode": "streamed", "packing": "padded"}, "shares of a mixture that is streamed are counted in rows"),
        ({"source": MIXTURE, "validation_fraction": 0.1}, "name a source of its own in data.validation"),
        ({"source": MIXTURE, "limit_documents": 3}, "limit_documents: it does not say of which source"),
        ({"validation": MIXTURE}, "validation: one source, not a mixture"),
        ({"source": mixture(MIXTURE)}, "a mixture in a mixture"),
        ({"source": mixture("corpus", "corpus", name="same")}, "names must differ, and are same, same"),
        ({"source": mixture("corpus", weight=0.0)}, "greater than 0"),
        ({"source": mixture("corpus", schedule=[[0, 1.0]])}, "give either weight or schedule"),
        ({"source": {"kind": "mixture", "sources": [{"source": "corpus"}]}}, "give either weight or schedule"),
        ({"source": scheduled([[5, 1.0]])}, r"rows \[5\] do not rise from 0"),
        ({"source": scheduled([[0, 1.0], [9, 0.5], [9, 0.1]])}, r"rows \[0, 9, 9\] do not rise from 0"),
        ({"source": scheduled([[0, 1.0], [9, 0.0]])}, "every weight is 0 at row 9"),
        ({"source": scheduled([[0, -1.0]])}, "greater than or equal to 0"),
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
    assert not has_validation(DataConfig.model_validate({"source": MIXTURE}))
    assert has_validation(DataConfig.model_validate({"source": mixture("corpus", "corpus"), "validation": "corpus"}))
    assert has_validation(DataConfig.model_validate({"source": JSONL, "validation": "corpus"}))
    assert has_validation(DataConfig.model_validate({"source": JSONL, "validation_fraction": 0.5}))


def test_what_may_change_when_a_run_resumes() -> None:
    free = {name for name in DataConfig.model_fields if not DataConfig.is_identity(name)}
    assert free == {"allow_repeat", "cache_dir", "ledger", "processes", "read_ahead_bytes", "retry", "workers"}


def test_a_mixture_is_written_and_read_back() -> None:
    """As the run folder keeps it, with names that follow from kinds and places."""
    source = {"kind": "mixture", "sources": [{"source": "corpus", "weight": 2}, {"source": JSONL, "schedule": [[0, 1], [10, 0.5]]}]}
    config = DataConfig.model_validate({"source": source})
    assert isinstance(config.source, MixtureConfig)
    assert config.source.names == ["corpus-0", "jsonl-1"]
    assert [part.knots for part in config.source.sources] == [((0, 2.0),), ((0, 1.0), (10, 0.5))]
    assert DataConfig.model_validate(to_table(config)) == config
