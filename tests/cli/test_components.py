"""``titanarch components``: every registered component is in the table, and the page is current."""

from pathlib import Path

import pytest

from tests.train.runs import environment, run_forks
from titanarch.cli.components import SLOTS, divided_by, entries
from titanarch.cli.main import main
from titanarch.contract.channel import ACTIVATIONS, CHANNELS
from titanarch.contract.mixer import MIXERS
from titanarch.contract.model import MODELS

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = {
    f"{slot} {entry.name}": entry for slot in SLOTS for entry in entries(slot) if entry.component.__module__.startswith("titanarch.models")
}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_component_has_a_card(name: str) -> None:
    entry = SHIPPED[name]
    assert "card" in vars(entry.component), f"{name} has no card of its own; add card = Card(title, paper, reference)"
    assert all((entry.card.title, entry.card.paper, entry.card.reference))


def test_cards_are_told_apart() -> None:
    titles = [entry.card.title for entry in SHIPPED.values()]
    assert sorted({title for title in titles if titles.count(title) > 1}) == []


def test_the_page_is_current() -> None:
    """In a process of its own, since tests register components that the page must not list."""
    (made,) = run_forks([(["components", "--markdown"], environment())])
    assert made.returncode == 0, made.stderr
    message = "docs/components.md is stale: python -m titanarch components --markdown > docs/components.md"
    assert (REPOSITORY / "docs" / "components.md").read_text("utf-8") == made.stdout, message
    rows = [line for line in made.stdout.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [entry.name for entry in SHIPPED.values()]


def test_declarations_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert divided_by(MIXERS["attention"]) == "TP; CP: gather, heads, ring"
    assert divided_by(MIXERS["external"]) == "-"
    assert divided_by(CHANNELS["mlp"]) == "TP; CP: any"
    assert divided_by(MODELS["decoder"]) == "TP, CP as its parts"
    assert divided_by(ACTIVATIONS["isotropic"]) == "TP; CP: any"
    assert divided_by(ACTIVATIONS["isotropic_as_in_the_notes"]) == "CP: any", "it reads all hidden units"
    assert main(["components", "channel"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["slot", "name"]
    assert {tuple(row.split()[:2]) for row in rows} >= {("channel", "mlp"), ("channel", "swiglu")}
    assert len(rows) == len(entries("channel"))
    (mlp,) = (row for row in rows if row.split()[1] == "mlp")
    assert "down, up" in mlp
    assert mlp.endswith("transformers GPT2MLP, T5DenseActDense")


def test_an_unknown_slot_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["components", "mixers"]) == 2
    assert capsys.readouterr().err == "no slot is called 'mixers'; did you mean 'mixer'?\n"
