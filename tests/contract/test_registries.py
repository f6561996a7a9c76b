"""Every registered mixer and channel mixer keeps the contract, on one process and on two. A new one is checked without being named."""

from typing import Any

import pytest

from titanarch.contract.channel import CHANNELS
from titanarch.contract.mixer import MIXERS, RecurrentMixer
from titanarch.testing.divided import check_divided
from titanarch.testing.findings import Finding
from titanarch.testing.kit import CHECKS, run_check
from titanarch.testing.subject import Subject

TABLES: dict[str, dict[str, Any]] = {
    "external": {"module": "torch.nn:Linear", "arguments": {"in_features": "$d_model", "out_features": "$d_model"}},
}
"""Of what has no defaults."""


def shipped() -> list[Subject]:
    """Those of the package, not what other tests register; the channel ``none`` is no component."""
    mixers = [Subject("mixer", kind, TABLES.get(kind, {})) for kind in MIXERS]
    channels = [Subject("channel", kind, TABLES.get(kind, {})) for kind in CHANNELS if kind != "none"]
    return [subject for subject in mixers + channels if subject.component.__module__.startswith("titanarch.models.")]


SUBJECTS = {subject.name: subject for subject in shipped()}


@pytest.mark.parametrize("name", SUBJECTS)
def test_on_one_process(name: str) -> None:
    findings = [run_check(SUBJECTS[name], check) for check in CHECKS]
    assert [str(finding) for finding in findings if not finding.passed] == []


@pytest.mark.parametrize("name", SUBJECTS)
def test_recurrent_mixers_decode(name: str) -> None:
    component = SUBJECTS[name].component
    if issubclass(component, RecurrentMixer):
        assert run_check(SUBJECTS[name], "decoding").status == "ok"
        assert run_check(SUBJECTS[name], "states").status == "ok"


@pytest.fixture(scope="module")
def divided() -> list[Finding]:
    return check_divided(list(SUBJECTS.values()), 2)


@pytest.mark.parametrize("name", SUBJECTS)
def test_on_two_processes(divided: list[Finding], name: str) -> None:
    found = [finding for finding in divided if finding.subject == name]
    assert [str(finding) for finding in found if not finding.passed] == []
    assert {"tensor parallel", "tensor and sequence parallel", "FSDP2", "FSDP2 in bf16"} <= {finding.check for finding in found}
