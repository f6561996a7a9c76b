import re
from typing import Annotated, Any

from pydantic import Field

from tests.config.small_run import POSITIONS, Alibi, PositionConfig, Rotary, SmallRun
from titanarch.config.places import reachable
from titanarch.config.reference import reference_page
from titanarch.config.section import ListOf, Section

PAGE = reference_page(SmallRun)


def part(heading: str) -> str:
    """What stands under a heading."""
    return PAGE.split(f"{heading}\n")[1].split("\n#")[0].strip()


def test_a_section_in_full() -> None:
    assert part("## `[training]`, required") == (
        "How long and on what.\n\n"
        "| key | type | default | meaning | on resume |\n"
        "|---|---|---|---|---|\n"
        "| `steps` | integer > 0 | required | optimizer steps | fixed |\n"
        "| `learning_rate` | number > 0 | `0.0003` | peak rate | fixed |\n"
        '| `warmup` | integer or `"auto"` or `"none"` | `"auto"` | steps | fixed |\n'
        "| `tokens` | integer | unset | budget, tokens | fixed |\n"
        "| `deterministic` | true or false | `false` | bitwise the same each time | free |\n"
        "| `betas` | array of 2: number, number | `[0.9, 0.95]` | momenta | fixed |"
    )


def test_components_and_what_picks_them() -> None:
    assert "| `model` | [model](#slot-model) | required | the model | fixed |" in PAGE
    assert part("## Slot: mixer") == "Named by `kind`, one of `attention`, `serial`."
    assert "| `position` | [position](#slot-position) or array of: [position](#slot-position) | `[]` |" in part("### `attention`")
    assert "| `n_heads` | integer >= 1, <= 64 | `8` | heads | fixed |" in part("### `attention`")
    assert '| `first` | [mixer](#slot-mixer) | `"attention"` | a mixer inside a mixer | fixed |' in part("### `serial`")
    decoder = part("### `decoder`")
    assert (
        '| `relative` | [position](#slot-position) or array of: [position](#slot-position) | `"alibi"` | one or several | fixed |'
        in decoder
    )
    assert "| `mixers` | table: name to [mixer](#slot-mixer) | `{}` | by name | fixed |" in decoder
    assert '| `layers` | array of: string, length >= 1 | `["attention"]` |' in decoder
    assert part("### `console`") == "No keys of its own."


def test_sections_inside_others() -> None:
    assert "| `width` | integer | `80` | characters | free |" in part("## `[metrics.inner]`")
    assert "| `factor` | number | `1.0` | how much longer, a ratio | fixed |" in part("### `[rotary.scaling]`")
    sources = part("## `[[data.sources]]`")
    assert sources.startswith("what to read\n")  # the section has no docstring, its field a description
    assert "| `path` | string | required | URL | fixed |" in sources


def test_every_key_of_every_section_has_a_row_or_a_heading() -> None:
    found = reachable(SmallRun)
    assert len(found.sections) == 17
    for section in found.sections:
        for name, field in section.model_fields.items():
            row = f"| `{name}` | "
            heading = re.search(rf"`\[+([a-z_.]+\.)?{name}\]+`", PAGE)
            assert (row in PAGE and (field.description or "") in PAGE) or heading, f"{section.__qualname__}.{name}"


def test_defaults_are_as_short_as_a_file_could_give_them() -> None:
    class Root(Section):
        several: ListOf[Annotated[PositionConfig, POSITIONS]] = Field((Alibi.Config(), Rotary.Config(theta=2.0)), description="several")
        long: int = Field(2**62, lt=2**63, description="long")

    page = reference_page(Root)
    assert '| `["alibi", { kind = "rotary", theta = 2.0 }]` | several |' in page
    assert "| `long` | integer < 9223372036854775808 | `4611686018427387904` |" in page


def test_bars_and_line_ends_do_not_break_the_table() -> None:
    class Odd(Section):
        a: str = Field("|", description="one | two\nthree")
        b: dict[str, Any] = Field({}, description="any")

    assert '| `a` | string | `"\\|"` | one \\| two three | fixed |' in reference_page(Odd)
    assert "| `b` | table | `{}` | any | fixed |" in reference_page(Odd)
