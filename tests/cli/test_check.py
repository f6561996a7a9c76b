"""``titanarch check``: a line a check, and what its exit status says."""

import pytest

import tests.contract.broken
from titanarch.cli.main import main
from titanarch.testing.kit import CHECKS


def test_a_component_that_keeps_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "mixer", "attention", "--table", "n_kv_heads = 2", "--table", "window = 5"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line[6:].partition(":")[0] for line in lines] == list(CHECKS)
    assert {line[:5].strip() for line in lines} == {"ok", "-"}
    assert (
        lines[list(CHECKS).index("parameters")] == "ok    parameters: 3,072, 3,072 in blocks 0 to 1"
    )  # 32 x 32 for q and output, half for k, v
    assert last == "mixer attention keeps the contract"


def test_one_that_breaks_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "mixer", "broken_miscounted", "--import", tests.contract.broken.__name__]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("FAIL")] == [
        "FAIL  parameters: mixer broken_miscounted: cost counts 3,077 parameters in block 0, which has 3,076; correct cost"
    ]
    assert last == f"mixer broken_miscounted: 1 of {len(CHECKS)} checks failed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mixer", "atention"], "unknown mixer 'atention'; did you mean 'attention'?; --import names what registers it\n"),
        (["mixer", "attention", "--import", "no_such_module_here"], "cannot import 'no_such_module_here'"),
        (["mixer", "attention", "--table", "n_heads"], "--table is no TOML: "),
        (["channel", "mlp", "--table", "d_f = 3"], "table of channel mlp: [channel] d_f: unknown key; did you mean 'd_ff'?\n"),
        (["channel", "mlp", "--table", "d_ff = 0"], "d_ff: must be > 0"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["norm", "rmsnorm"], ["mixer"], ["mixer", "attention", "--processes", "0"]])
def test_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["check", *arguments])
    assert stopped.value.code == 2
