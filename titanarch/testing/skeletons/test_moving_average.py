"""moving_average equals its formula and keeps the contract of a mixer."""

import pytest
import torch

from titanarch.contract.sequence import SequenceInfo
from titanarch.testing.divided import check_divided
from titanarch.testing.kit import CHECKS, run_check
from titanarch.testing.skeletons.moving_average import averages
from titanarch.testing.subject import Subject

SUBJECT = Subject("mixer", "moving_average", imports=("titanarch.testing.skeletons.moving_average",))


@pytest.mark.parametrize("check", CHECKS)
def test_one_process(check: str) -> None:
    finding = run_check(SUBJECT, check)
    assert finding.passed, finding


def test_two_processes() -> None:
    failed = [str(finding) for finding in check_divided([SUBJECT], 2) if not finding.passed]
    assert failed == []


def test_equals_its_formula() -> None:
    """Token by token, in two documents of 4 and 5 tokens. Compare your own mixer with an implementation by other hands."""
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    seq = SequenceInfo(position, (torch.arange(9) >= 4).long()[None], torch.arange(9), torch.zeros(1).long(), length=9, seed=None)
    v_BTHV, decay_H = torch.randn(1, 9, 2, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    a, y = torch.sigmoid(decay_H)[:, None], torch.zeros(2, 3, dtype=torch.float64)
    expected = []
    for t in range(9):
        y = (0 if position[0, t] == 0 else a * y) + (1 - a) * v_BTHV[0, t]
        expected.append(y)
    found, _ = averages(v_BTHV, decay_H, seq)
    torch.testing.assert_close(found[0], torch.stack(expected))
