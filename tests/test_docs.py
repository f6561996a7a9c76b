"""What the pages in docs/ say is true: the generated page, the paths, keys and TOML they name, and the example mixer."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models.materialize import materialized
from tests.user_code import REPOSITORY, losses_of_three_steps, titanarch
from titanarch.cli.new import written
from titanarch.config.errors import ConfigError
from titanarch.config.load import load_config
from titanarch.config.registry import Registry
from titanarch.config.section import Section
from titanarch.contract.mixer import MIXERS
from titanarch.contract.model import MODELS, Model
from titanarch.contract.sequence import SequenceInfo
from titanarch.train.check import meta_model
from titanarch.train.run_config import RunConfig

DOCS = REPOSITORY / "docs"
GENERATED = DOCS / "configuration.md"
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path != GENERATED)
EXAMPLE = "adding_a_mixer.md"


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_the_pages_are_there() -> None:
    wanted = {"design", "from_the_notes", "adding_a_mixer", "data", "checkpoints", "evaluation"}
    assert {f"{name}.md" for name in wanted} <= set(PAGES)


def test_the_page_of_keys_is_current() -> None:
    """In a process of its own, since tests register components that the page must not list."""
    made = titanarch("config", "docs")
    assert made.returncode == 0, made.stderr
    message = "docs/configuration.md is stale: python -m titanarch config docs > docs/configuration.md"
    assert GENERATED.read_text("utf-8") == made.stdout, message


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (DOCS / page).read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (DOCS / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    text = (DOCS / page).read_text("utf-8")
    named = set(re.findall(r"(?<![\w/.-])((?:titanarch|tests|train_configs|docs|scripts|benchmarks)/[\w./-]*\w)", text))
    assert {name for name in named if not (REPOSITORY / name).exists()} == set()


@pytest.mark.parametrize("page", [page for page in PAGES if page != EXAMPLE])
def test_toml_is_valid(page: str, tmp_path: Path) -> None:
    """Each block, laid over the smallest shipped configuration."""
    for number, block in enumerate(blocks(page, "toml")):
        file = tmp_path / f"{number}.toml"
        file.write_text(f'extends = "{REPOSITORY}/train_configs/debug.toml"\n{block}')
        load_config(file, [], RunConfig)


MARCH = (
    *("BaselineV2", "BaselineLarge", "DOBaseline", "T5Small", "T5Large", "SmallFullTrain", "ModelDim*", "Layers*", "FFDim*", "FFScale*"),
    *("NoFF", "NoFFParamMatch", "ValuesRelu", "ValuesReluNoUpProj", "ValuesReluFirstFF", "FCABS", "mixed activations", "scaling heads"),
    *("big heads (summed, pooled)", "a database", "unified attention", "tensor-product weights and embeddings", "sparse lengths"),
    "cross-attention without key and value weights",
)
"""Its classes of experiments and, of those whose sources are lost, their names."""


def test_every_experiment_of_march_is_named() -> None:
    text = " ".join((DOCS / "from_the_notes.md").read_text("utf-8").split())
    assert [name for name in MARCH if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)] == []


def fields_of(section: type[Section], name: str) -> Iterator[type[Section]]:
    """The sections that may stand in a field: its own, or those of the components that it can name."""
    field = section.model_fields[name]
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
        yield field.annotation
    for registry in field.metadata:
        if isinstance(registry, Registry):
            yield from (registry[component].Config for component in registry)


def is_key(key: str) -> bool:
    """Whether a dotted key is one of the schema's; below ``model.mixers`` stand names that a user chooses."""
    names, sections = key.split("."), [RunConfig]
    for name in names[:-1]:
        sections = [inner for section in sections if name in section.model_fields for inner in fields_of(section, name)]
        if any("mixers" in section.model_fields for section in sections) and names[1] == "mixers":
            return True
    return any(names[-1] in (*section.model_fields, "kind", "name") for section in sections)


@pytest.mark.parametrize("page", PAGES)
def test_keys_that_are_named_exist(page: str) -> None:
    text = (DOCS / page).read_text("utf-8")
    sections = "|".join(RunConfig.model_fields)
    named = set(re.findall(rf"(?:`|--)((?:{sections})(?:\.[a-z_0-9]+)+)\b(?!\.\w|/)", text))
    files = {key for key in named if key.endswith((".json", ".jsonl", ".discarded"))}
    assert {key for key in named - files if not is_key(key)} == set()


@pytest.mark.parametrize(
    ("key", "known"),
    [("training.steps", True), ("optimizer.ns_steps", True), ("model.mixers.mine", True), ("training.stepz", False), ("x.y", False)],
)
def test_a_wrong_key_is_found(key: str, known: bool) -> None:
    assert is_key(key) is known


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two files of the example, as beside run_train.sh."""
    folder = tmp_path_factory.mktemp("example")
    (module,), toml = blocks(EXAMPLE, "python"), blocks(EXAMPLE, "toml")
    (folder / "moving_average.py").write_text(module)
    (folder / "moving_average.toml").write_text(toml[0])
    (folder / "external.toml").write_text(f'extends = "train_configs/debug.toml"\n{toml[1]}')
    (folder / "train_configs").symlink_to(REPOSITORY / "train_configs")
    return folder


def check_model(folder: Path) -> None:
    """The example's TOML builds a model that is causal, keeps documents apart, decodes, and costs what it has."""
    overrides = ["--training.seq_len=16", "--model.n_layers=3", "--model.d_model=24"]
    config = load_config(folder / "moving_average.toml", overrides, RunConfig).config
    model = materialized(lambda: MODELS.of(config.model)(config.model, 50, 16)).double()
    assert isinstance(model, Model)
    assert MODELS.of(config.model).cost(config.model, 50, 16).parameters == sum(p.numel() for p in model.parameters())
    tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        packed = model.logits(tokens, SequenceInfo.of_lengths([(7, 9)] * 2))
        whole = model.logits(tokens, SequenceInfo.whole(2, 16))
        alone = model.logits(tokens[:, 7:], SequenceInfo.whole(2, 9))
        torch.testing.assert_close(packed, torch.cat([whole[:, :7], alone], 1).to(packed.dtype), rtol=1e-9, atol=1e-9)
        changed = tokens.clone()
        changed[:, 9] = (changed[:, 9] + 1) % 50
        assert torch.equal(model.logits(changed, SequenceInfo.whole(2, 16))[:, :9], whole[:, :9])
        states = model.initial_state(2)
        for index in range(16):
            logits, states = model.step(tokens[:, index : index + 1], index, states)
            torch.testing.assert_close(logits, whole[:, index], rtol=1e-9, atol=1e-9)


@pytest.fixture
def importable(example: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example's folder, whose mixer is registered for one test; other tests register one of that name too."""
    monkeypatch.setattr(MIXERS, "_components", {name: MIXERS[name] for name in MIXERS if name != "moving_average"})
    monkeypatch.syspath_prepend(str(example))
    yield example
    sys.modules.pop("moving_average", None)


def test_the_example_is_what_new_writes(example: Path) -> None:
    """Whose contract tests/cli/test_new.py checks, on one process and on two."""
    files = {name: text for name, text in written("mixer", "moving_average", Path()).items() if not name.startswith("test_")}
    assert {name: (example / name).read_text() for name in files} == files


def test_a_model_of_the_example(importable: Path) -> None:
    check_model(importable)


def test_the_example_trains(example: Path) -> None:
    losses = losses_of_three_steps(example, "moving_average", evaluation__lengths="[32]", evaluation__max_tokens="256")
    assert losses[0] == pytest.approx(9.01 + 0.08, abs=0.1), "ln 8,192 and half the variance of the logits, 384 x 0.02^2"
    assert losses[2] < losses[0]


def test_the_external_example_builds(example: Path) -> None:
    config = load_config(example / "external.toml", [], RunConfig).config
    names = {name for name, _ in meta_model(config, 8192).named_parameters()}
    assert "layers.0.mixer.wrapped.weight_hh_l0" in names


def test_the_example_refuses_what_does_not_divide(importable: Path) -> None:
    config = load_config(importable / "moving_average.toml", ["--model.mixers.moving_average.n_heads=5"], RunConfig).config
    with pytest.raises(ConfigError, match=r"d_model \(384\) is not a multiple of n_heads \(5\)"):
        meta_model(config, 8192)
