"""The kit finds each way of breaking the contract, and says which component, what, how much and what to do."""

import pytest

import tests.contract.broken
from titanarch.config.errors import ConfigError
from titanarch.contract.card import Card
from titanarch.testing.divided import check_divided
from titanarch.testing.findings import Finding
from titanarch.testing.kit import run_check, run_checks
from titanarch.testing.subject import Subject

BROKEN = {
    "undeclared": ("declared", "does not declare 'wg'; say COLUMN, ROW"),
    "misnamed": ("names", "float8 names 'wx', which tensor_parallel does not declare"),
    "forgetful": ("initial weights", r"leaves out layers.0.component.head.decay_H.*fill each through init"),
    "unseeded": ("seed", "two starts from one seed differ in 'layers.0.component.wv.weight'"),
    "miscounted": ("parameters", "counts 3,077 parameters in block 0, which has 3,076"),
    "cheap": ("flops", "counts 4,096 FLOPs .* alone have 6,144; add the 2,048"),
    "prophet": ("causal", r"changing token 13 moves outputs before it by \d\.\de-0\d"),
    "gossip": ("packed", r"documents packed and documents alone differ by \d\.\de[+-]\d\d in output .*starts where seq.position_BT is 0"),
    "idle": ("gradients", "'layers.0.component.idle.weight' has no gradient"),
    "moody": ("deterministic", "two runs differ in output; draw with titanarch.ops.counter_random"),
    "wide": ("bf16", "given bf16 it returns torch.float32; cast"),
    "counting": ("half of the heads", "differ by 5.0e-01 in block 0 .*take head counts from the shapes"),
    "amnesic": ("decoding", "decoding and the whole forward differ by .* mix is given the state before the token"),
    "undecaying": ("states", r"two halves of a row and the whole differ by .*compose puts"),
    "crashing": ("causal", r"raised RuntimeError: the cause \(.*broken.py:\d+, in merge\)"),
}


def subject(name: str) -> Subject:
    return Subject("mixer", f"broken_{name}", imports=(tests.contract.broken.__name__,))


@pytest.mark.parametrize("name", BROKEN)
def test_a_breach_is_found(name: str) -> None:
    check, message = BROKEN[name]
    finding = run_check(subject(name), check)
    assert finding.status == "FAIL"
    assert finding.text.startswith(f"mixer broken_{name}: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(finding.text)


@pytest.mark.parametrize("name", ["undeclared", "miscounted", "counting"])
def test_the_other_checks_pass(name: str) -> None:
    failed = [finding.check for finding in run_checks(subject(name)) if not finding.passed]
    assert failed == [BROKEN[name][0]] if name != "undeclared" else failed[0] == "declared"


@pytest.fixture(scope="module")
def divided() -> list[Finding]:
    return check_divided([subject(name) for name in ("unsummed", "halving", "crashing", "miscounted")], 2)


@pytest.mark.parametrize(
    ("name", "ways", "message"),
    [
        ("unsummed", {"tensor parallel", "tensor and sequence parallel"}, r"of one differ by .* in layers.\d.component.turn.weight"),
        ("halving", {"context parallel by state"}, "outputs and gradients of 2 processes and of one differ by"),
        ("miscounted", set(), ""),
    ],
)
def test_a_breach_among_processes_is_found(divided: list[Finding], name: str, ways: set[str], message: str) -> None:
    found = {finding.check: finding for finding in divided if finding.subject == f"mixer broken_{name}"}
    assert {check for check, finding in found.items() if not finding.passed} == ways
    assert {"FSDP2", "context parallel by heads, head-tail"} <= found.keys()
    for way in ways:
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(found[way].text)


def test_a_crash_in_one_subject_leaves_the_others_alone(divided: list[Finding]) -> None:
    crashed = [finding for finding in divided if finding.subject == "mixer broken_crashing"]
    assert [finding.check for finding in crashed] == ["one process"]
    assert "raised RuntimeError: the cause" in crashed[0].text


def test_what_a_card_admits_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card("average", "-", "closed form", differs={"parameters": "one is counted twice"})
    monkeypatch.setattr(tests.contract.broken.Miscounted, "card", card)
    finding = run_check(subject("miscounted"), "parameters")
    assert finding.status == "known"
    assert finding.text.startswith("one is counted twice (mixer broken_miscounted: cost counts")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Subject("mixer", "atention"), "unknown mixer 'atention'; did you mean 'attention'"),
        (Subject("channel", "none"), "stands for nothing"),
        (Subject("mixer", "attention", {"n_kv_head": 2}), r"\[mixers.attention\] n_kv_head: unknown key; did you mean 'n_kv_heads'"),
        (Subject("mixer", "attention", {"n_kv_heads": 3}), r"n_heads \(4\) is not a multiple of n_kv_heads \(3\)"),
        (Subject("mixer", "mine", imports=("no_such_module_here",)), "cannot import 'no_such_module_here'"),
    ],
)
def test_what_cannot_be_checked_is_refused(wrong: Subject, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_checks(wrong)
