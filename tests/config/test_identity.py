import hashlib
import json
import math
from typing import Annotated, Any

from pydantic import Field

from tests.config.small_run import SINKS, SinkConfig, SmallRun
from titanarch.config.identity import identity_differences, identity_hash, identity_table
from titanarch.config.section import FREE, Section


def run(**tables: Any) -> SmallRun:
    return SmallRun.model_validate({"model": "decoder", "training": {"steps": 10}} | tables)


def test_the_table_holds_identity_keys_alone() -> None:
    config = run(
        model={"name": "decoder", "relative": ["alibi", {"kind": "rotary"}], "mixers": {"attention": {"position": "alibi"}}},
        job={"dump_folder": "elsewhere"},
        data={"sources": [{"path": "x"}]},
        metrics={"sinks": ["console"]},
    )
    assert identity_table(config) == {
        "job.config_version": 1,  # an identity key in a free section
        "model.name": "decoder",
        "model.dim": 64,
        "model.layers": ["attention"],
        "model.position": [],
        "model.relative[0].kind": "alibi",
        "model.relative[0].slope": 1.0,
        "model.relative[1].kind": "rotary",
        "model.relative[1].theta": 1e4,
        "model.relative[1].scaling.factor": 1.0,
        "model.mixers.attention.kind": "attention",
        "model.mixers.attention.n_heads": 8,
        "model.mixers.attention.position[0].kind": "alibi",
        "model.mixers.attention.position[0].slope": 1.0,
        "training.steps": 10,
        "training.learning_rate": 3e-4,
        "training.warmup": "auto",
        "training.betas": [0.9, 0.95],  # tokens is None; deterministic is free
        "data.sources[0].path": "x",
        "data.sources[0].weight": 1.0,
    }


def test_a_free_field_frees_all_that_it_holds() -> None:
    class Inner(Section):
        a: int = Field(1, description="a")

    class Root(Section, identity=False):
        inherits: Inner = Field(Inner(), description="decides for itself")
        freed: Inner = Field(Inner(), description="free", json_schema_extra=FREE)
        sink: Annotated[SinkConfig, SINKS] = Field(description="goes with its field")

    assert identity_table(Root(sink=SINKS["console"].Config())) == {"inherits.a": 1}


def test_the_hash_is_of_the_table_and_of_nothing_free() -> None:
    text = json.dumps(dict(sorted(identity_table(run()).items())), separators=(",", ":"))
    assert identity_hash(run()) == hashlib.sha256(text.encode()).hexdigest()
    assert identity_hash(run(job={"comment": "x"}, metrics={"log_freq": 3})) == identity_hash(run())
    assert identity_hash(run(training={"steps": 11})) != identity_hash(run())
    assert identity_hash(run(training={"steps": 10, "deterministic": True})) == identity_hash(run())


def test_differences_name_key_and_both_values() -> None:
    saved = json.loads(json.dumps(identity_table(run())))
    assert identity_differences(saved, identity_table(run())) == []
    now = identity_table(run(model={"name": "decoder", "relative": "rotary"}, training={"steps": 12, "tokens": 5}))
    assert identity_differences(saved, now) == [
        ("model.relative.kind", "alibi", "rotary"),
        ("model.relative.theta", None, 1e4),
        ("model.relative.scaling.factor", None, 1.0),
        ("training.steps", 10, 12),
        ("training.tokens", None, 5),
        ("model.relative.slope", 1.0, None),
    ]


def test_nan_equals_itself_and_true_is_not_one() -> None:
    assert identity_differences({"a": math.nan}, {"a": math.nan}) == []
    assert identity_differences({"a": True}, {"a": 1}) == [("a", True, 1)]
