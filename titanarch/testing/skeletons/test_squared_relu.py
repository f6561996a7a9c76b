"""squared_relu equals its formula and keeps the contract of a channel mixer."""

import pytest
import torch

from titanarch.testing.divided import check_divided
from titanarch.testing.kit import CHECKS, run_check
from titanarch.testing.skeletons.squared_relu import SquaredRelu
from titanarch.testing.subject import Subject, built, inputs, rows

SUBJECT = Subject("channel", "squared_relu", imports=("titanarch.testing.skeletons.squared_relu",))


@pytest.mark.parametrize("check", CHECKS)
def test_one_process(check: str) -> None:
    finding = run_check(SUBJECT, check)
    assert finding.passed, finding


def test_two_processes() -> None:
    failed = [str(finding) for finding in check_divided([SUBJECT], 2) if not finding.passed]
    assert failed == []


def test_equals_its_formula() -> None:
    """Written out. Compare your own channel mixer with an implementation by other hands."""
    stack, (x, _) = built(SUBJECT), inputs()
    channel = next(stack.components())
    assert isinstance(channel, SquaredRelu)
    expected = torch.clamp(x @ channel.up.weight.T, min=0) ** 2 @ channel.down.weight.T
    torch.testing.assert_close(channel(x, rows(stack)), expected)
