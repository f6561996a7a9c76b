"""Files laid over one another, overrides, origins and custom imports."""

import textwrap
from pathlib import Path

import pytest

from tests.config.small_run import POSITIONS, Alibi, Attention, Decoder, HNet, Learned, PositionConfig, Rotary, SmallRun
from titanarch.config.errors import ConfigError, Problem
from titanarch.config.load import Loaded, load_config

WHOLE = """
    [model]
    name = "decoder"
    [training]
    steps = 10
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that files go by short names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(textwrap.dedent(text))


def load(*overrides: str) -> Loaded[SmallRun]:
    return load_config("run.toml", overrides, SmallRun)


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value).splitlines()


@pytest.mark.usefixtures("folder")
class TestLayers:
    def test_tables_merge_and_arrays_are_replaced(self) -> None:
        write("base.toml", WHOLE + "learning_rate = 1.0\n[[data.sources]]\npath = 'a'\n[[data.sources]]\npath = 'b'\n")
        write("run.toml", "extends = 'base.toml'\n[training]\nsteps = 20\n[[data.sources]]\npath = 'c'\n")
        loaded = load()
        assert loaded.config.training.steps == 20
        assert loaded.config.training.learning_rate == 1.0
        assert [source.path for source in loaded.config.data.sources] == ["c"]
        assert loaded.table == {
            "model": {"name": "decoder"},
            "training": {"steps": 20, "learning_rate": 1.0},
            "data": {"sources": [{"path": "c"}]},
        }

    def test_chains_and_lists_of_bases_count_paths_from_each_file(self) -> None:
        write("deep/root.toml", WHOLE + "learning_rate = 1.0\nwarmup = 1\n")
        write("deep/middle.toml", "extends = 'root.toml'\n[training]\nlearning_rate = 2.0\nwarmup = 2\n")
        write("other.toml", "[training]\nwarmup = 3\n")
        write("arms/run.toml", "extends = ['../deep/middle.toml', '../other.toml']\n[job]\ncomment = 'x'\n")
        loaded = load_config("arms/run.toml", [], SmallRun)
        training = loaded.config.training
        assert (training.steps, training.learning_rate, training.warmup) == (10, 2.0, 3)
        assert loaded.origin("training.steps") == ("deep/root.toml", 5)
        assert loaded.origin("training.learning_rate") == ("deep/middle.toml", 3)
        assert loaded.origin("training.warmup") == ("other.toml", 2)
        assert loaded.origin("job.comment") == ("arms/run.toml", 3)

    def test_a_circle_is_refused(self) -> None:
        write("run.toml", "extends = 'a.toml'\n")
        write("a.toml", "\nextends = './run.toml'\n")
        assert problems() == ["a.toml:2: extends: makes a circle: run.toml -> a.toml -> run.toml"]

    def test_two_ways_to_one_base_are_no_circle(self) -> None:
        write("root.toml", WHOLE)
        write("a.toml", "extends = 'root.toml'\n")
        write("b.toml", "extends = 'root.toml'\n")
        write("run.toml", "extends = ['a.toml', 'b.toml']\n")
        assert load().config.training.steps == 10

    def test_what_is_wrong_with_any_file_is_shown_at_once(self) -> None:
        write("run.toml", "extends = ['bad.toml', 'none.toml', 'latin.toml', 'number.toml']\n")
        write("bad.toml", "a = 1\n\nb = \n")
        Path("latin.toml").write_bytes("# ok\na = 'ü'".encode("latin-1"))
        write("number.toml", "extends = 3")
        assert problems("stray") == [
            "bad.toml:3: not valid TOML: Invalid value, at column 5",
            "run.toml:1: extends: no file none.toml; the path counts from the folder of run.toml",
            "latin.toml:2: not UTF-8 text, which TOML demands; save the file as UTF-8",
            "number.toml:1: extends: wants a file or an array of files, got the integer 3",
            "command line: 'stray' belongs to no option; write --section.key value",
        ]

    def test_an_error_at_the_end_has_the_last_line(self) -> None:
        write("run.toml", "a = 1\nb = [1,\n")
        assert problems()[0].startswith("run.toml:3: not valid TOML: ")

    def test_a_missing_file_and_a_folder(self, folder: Path) -> None:
        assert problems() == ["run.toml: cannot read the configuration: No such file or directory"]
        (folder / "run.toml").mkdir()
        assert problems() == ["run.toml: cannot read the configuration: Is a directory"]


@pytest.mark.usefixtures("folder")
class TestComponents:
    def relative(self, base: str, *overrides: str) -> object:
        write("run.toml", f"[model]\nname = 'decoder'\nrelative = {base}\n[training]\nsteps = 1\n")
        loaded = load(*overrides)
        assert isinstance(loaded.config.model, Decoder.Config)
        return loaded.config.model.relative

    def test_another_kind_replaces_the_table(self) -> None:
        rotary = "{ kind = 'rotary', theta = 5.0 }"
        assert self.relative(rotary, "--model.relative=alibi") == Alibi.Config()
        assert self.relative(rotary, "--model.relative={ kind = 'alibi', slope = 2.0 }") == Alibi.Config(slope=2.0)
        assert self.relative("'learned'", "--model.relative.kind=alibi") == Alibi.Config()

    def test_the_same_kind_merges(self) -> None:
        rotary = "{ kind = 'rotary', theta = 5.0 }"
        assert self.relative(rotary, "--model.relative=rotary") == Rotary.Config(theta=5.0)
        assert self.relative(rotary, "--model.relative.scaling.factor=2.0") == Rotary.Config(
            theta=5.0, scaling=Rotary.Config.Scaling(factor=2.0)
        )

    def test_a_table_without_kind_merges_into_a_bare_name(self) -> None:
        assert self.relative("'rotary'", "--model.relative.theta=7.0") == Rotary.Config(theta=7.0)
        assert self.relative("'alibi'", "--model.relative=learned", "--model.relative.max_length=3") == Learned.Config(max_length=3)

    def test_an_array_of_components_is_replaced(self) -> None:
        assert self.relative("['alibi', 'rotary']", "--model.relative=['alibi']") == (Alibi.Config(),)
        assert self.relative("['alibi', 'rotary']", "--model.relative=alibi") == Alibi.Config()

    @pytest.mark.parametrize(
        ("override", "merged"),
        [
            ("kind=alibi", Alibi.Config()),
            ("theta=6.0", Rotary.Config(theta=6.0, scaling=Rotary.Config.Scaling(factor=2.0))),
            ("scaling.factor=3.0", Rotary.Config(theta=5.0, scaling=Rotary.Config.Scaling(factor=3.0))),
        ],
    )
    def test_a_single_item_of_an_array_merges_as_a_component(self, override: str, merged: PositionConfig) -> None:
        table = "position = { kind = 'rotary', theta = 5.0, scaling = { factor = 2.0 } }"
        write("run.toml", WHOLE + f"[model.mixers.attention]\n{table}\n")
        loaded = load(f"--model.mixers.attention.position.{override}")
        assert isinstance(loaded.config.model, Decoder.Config)
        assert loaded.config.model.mixers["attention"] == Attention.Config(position=(merged,))
        key = override.partition("=")[0]
        assert loaded.origin(f"model.mixers.attention.position[0].{key}") == ("command line", None)

    def test_the_slot_decides_which_key_names_the_component(self) -> None:
        write("run.toml", "[model]\nname = 'decoder'\ndim = 3\n[training]\nsteps = 1\n")
        assert load("--model.name=hnet").config.model == HNet.Config()
        assert load("--model=decoder").config.model == Decoder.Config(dim=3)

    def test_a_component_in_a_mapping_is_of_the_kind_it_is_named_after(self) -> None:
        write("run.toml", WHOLE + "[model.mixers.attention]\nn_heads = 2\nposition = 'rotary'\n")
        model = load("--model.mixers.attention.kind=attention", "--model.mixers.attention.position.theta=3.0").config.model
        assert isinstance(model, Decoder.Config)
        assert model.mixers == {"attention": Attention.Config(n_heads=2, position=(Rotary.Config(theta=3.0),))}
        serial = load("--model.mixers.attention.kind=serial").config.model
        assert isinstance(serial, Decoder.Config)
        assert serial.mixers["attention"].kind == "serial"

    def test_a_plain_string_is_no_component(self) -> None:
        write("run.toml", WHOLE + "[job]\ncomment = 'alibi'\n")
        assert problems("--job.comment.slope=1") == ["command line: [job] comment: wants a string, got the table { slope = 1 }"]

    def test_replaced_keys_have_no_origin(self) -> None:
        write("run.toml", WHOLE + "[model.relative]\nkind = 'rotary'\ntheta = 1.0\n")
        assert load().origin("model.relative.theta") == ("run.toml", 8)
        assert load("--model.relative=learned", "--model.relative.max_length=2").origin("model.relative.theta") == ("command line", None)


@pytest.mark.usefixtures("folder")
class TestOrigins:
    def test_of_keys_items_tables_and_defaults(self) -> None:
        write("run.toml", "[model]\nname = 'decoder'\nlayers = [\n 'a',\n 'b']\n[training]\nsteps = 1\n[[data.sources]]\npath = 'x'\n")
        loaded = load("--training.tokens", "5")
        assert loaded.origin("model.layers[1]") == ("run.toml", 5)
        assert loaded.origin("data.sources[0].path") == ("run.toml", 9)
        assert loaded.origin("training") == ("run.toml", 6)
        assert loaded.origin("training.learning_rate") == ("run.toml", 6)
        assert loaded.origin("training.tokens") == ("command line", None)
        assert loaded.origin("metrics.log_freq") == ("run.toml", None)
        with pytest.raises(ValueError, match="no key"):
            loaded.origin("training[")

    def test_an_error_found_later_is_given_its_place(self) -> None:
        write("run.toml", WHOLE)
        loaded = load()
        error = ConfigError(Problem("too many", key="training.steps"), "plain", Problem("far", key="x.y", file="other.toml", line=1))
        assert str(loaded.located(error)) == "run.toml:5: [training] steps: too many\nplain\nother.toml:1: [x] y: far"
        assert str(loaded.problem("model", "odd")) == "run.toml:2: model: odd"


@pytest.mark.usefixtures("folder")
class TestCustomImport:
    @pytest.fixture(autouse=True)
    def on_the_path(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(folder))

    def test_a_users_component_is_registered_before_validation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(POSITIONS, "_components", dict(POSITIONS._components))
        write(
            "my_positions_1/own.py",
            """
            from pydantic import Field
            from tests.config.small_run import POSITIONS, PositionConfig

            @POSITIONS.register("own")
            class Own:
                class Config(PositionConfig):
                    size: int = Field(1, description="size")
            """,
        )
        write("base.toml", WHOLE + "[experimental]\ncustom_import = 'nothing_of_the_kind'\n")
        write(
            "run.toml",
            "extends = 'base.toml'\n[model]\nrelative = {kind = 'own', size = 2}\n[experimental]\ncustom_import = ['my_positions_1.own']\n",
        )
        model = load().config.model
        assert isinstance(model, Decoder.Config)
        assert (model.relative.kind, model.relative.size) == ("own", 2)  # type: ignore[union-attr]

    def test_what_cannot_be_imported_is_named_with_all_else_that_is_wrong(self) -> None:
        write(
            "run.toml",
            WHOLE + "x = 1\n[model.relative]\nkind = 'own'\n[experimental]\ncustom_import = [\n'no_such_package.own',\n'a/b.py']\n",
        )
        assert problems() == [
            "run.toml:6: [training] x: unknown key; allowed: betas, deterministic, learning_rate, steps, tokens, warmup",
            "run.toml:11: [experimental] custom_import: cannot import 'no_such_package.own': No module named 'no_such_package'; "
            "install it, or put its folder on PYTHONPATH",
            "run.toml:12: [experimental] custom_import: 'a/b.py' is no module; write it as in an import, such as 'my_package.mixers'",
        ]

    def test_an_error_inside_the_module_is_not_hidden(self) -> None:
        write("raises_on_import_1.py", "raise RuntimeError('inside')\n")
        write("run.toml", WHOLE)
        with pytest.raises(RuntimeError, match="inside"):
            load("--experimental.custom_import", "raises_on_import_1")

    def test_another_type_is_refused(self) -> None:
        write("run.toml", WHOLE)
        assert problems("--experimental.custom_import=3") == [
            "command line: [experimental] custom_import: wants a string or an array, got the integer 3; "
            "write --experimental.custom_import='\"3\"'"
        ]
