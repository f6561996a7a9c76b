import json
from pathlib import Path

import pytest

from tests.data.common import data_config, loader_of
from titanarch.cli.main import main
from titanarch.config.dump import toml_value
from titanarch.data.cache import open_tokens
from titanarch.data.config import DataConfig
from titanarch.data.phases import Phase
from titanarch.data.rows import IndexedRows
from titanarch.data.tokenizers import BytesConfig, BytesTokenizer

TEXTS = [f"document {i}, of some words" for i in range(20)]
LENGTH = len(TEXTS[0]) + 1
DEBUG_RUN = Path(__file__).parents[2] / "train_configs" / "debug.toml"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": f"name {i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


@pytest.fixture
def source(path: Path) -> list[str]:
    return ["--data.source", f'{{kind = "jsonl", paths = ["{path}"], id_key = "id"}}', "--data.tokenizer", "bytes"]


def test_prepare_then_inspect(source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tokens"
    assert main(["data", "prepare", *source, "--data.validation_fraction", "0.3", "--out", str(out)]) == 0
    written = capsys.readouterr().out
    counts = {split: json.loads((out / split / "meta.json").read_text())["documents"] for split in ("train", "validation")}
    assert sum(counts.values()) == len(TEXTS)
    assert min(counts.values()) > 0
    assert all(f"{out / split}: {n} documents, " in written for split, n in counts.items())
    tokens = ["--data.source", f'{{kind = "tokens", path = "{out}"}}', "--data.tokenizer", "bytes"]
    assert main(["data", "inspect", *tokens, "--split", "validation", "--verify", "--documents", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"validation: {counts['validation']} documents, ")
    assert shown[0].endswith("checksums right")
    assert len(shown) == 3 + 2


def test_prepare_refuses_a_folder_that_exists(source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert main(["data", "prepare", *source, "--out", str(tmp_path / "out")]) == 2
    assert "exists already: remove it or choose another --out" in capsys.readouterr().err
    assert main(["data", "prepare", "--data.source", '{kind = "tokens", path = "x"}', "--out", str(tmp_path / "new")]) == 2
    assert "prepared already" in capsys.readouterr().err


def test_a_bad_line_leaves_nothing(path: Path, source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(path.read_text() + "not json\n")
    assert main(["data", "prepare", *source, "--out", str(tmp_path / "out")]) == 2
    assert f"{path}:21: is not JSON" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_inspect_lists_documents(source: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", *source, "--documents", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    n_bytes = sum(map(len, TEXTS))
    assert lines[0] == f"train: 20 documents, {n_bytes + 20:,} tokens, {n_bytes:,} bytes ({n_bytes / (n_bytes + 20):.2f} a token)"
    assert lines[1] == f"tokens a document: shortest {LENGTH}, p10 {LENGTH}, median {LENGTH}, p90 {LENGTH + 1}, longest {LENGTH + 1}"
    assert [line.split() for line in lines[3:]] == [[str(LENGTH), str(LENGTH - 1), "name", str(i)] for i in range(3)]


def test_row_of_streams_with_its_boundaries(source: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Row 3 of two streams is the second row of stream 1, whose documents are those of odd number."""
    n_tokens = LENGTH + 5
    arguments = ["--data.mode", "streamed", "--data.streams", "2", "--row", "3", "--seq-len", str(n_tokens)]
    assert main(["data", "inspect", *source, *arguments]) == 0
    whole = "|".join(TEXTS[1::2])[n_tokens : 2 * n_tokens]
    first, second = whole.split("|")
    assert capsys.readouterr().out.splitlines() == [
        f"row 3: {n_tokens} tokens, {n_tokens - 1} of them with a target",
        f"--- document 0: tokens 0 to {len(first)} ---",
        first,
        f"--- document 1: tokens {len(first) + 1} to {n_tokens - 1} ---",
        second,
    ]


def test_row_by_a_configuration_file(path: Path, source: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*source, "--training.seq_len", "40", "--debug.seed", "5", "--data.limit_documents", "0"]
    assert main(["data", "inspect", "--config", str(DEBUG_RUN), *overrides, "--row", "2"]) == 0
    shown = capsys.readouterr().out
    table = {"tokenizer": "bytes", "source": {"kind": "jsonl", "paths": [str(path)], "id_key": "id"}}
    tokenizer = BytesTokenizer(BytesConfig())
    rows = IndexedRows(open_tokens(DataConfig.model_validate(table), "train", tokenizer), seq_len=40, seed=5, packing="concat")
    assert shown.startswith("row 2: 40 tokens, ")
    text = "".join(line for line in shown.splitlines()[1:] if not line.startswith("--- "))
    assert text == tokenizer.decode(rows.read(2, 1).tokens_BS[0, :-1])


@pytest.mark.parametrize(("mode", "packing"), [("indexed", "concat"), ("streamed", "concat"), ("indexed", "best_fit")])
@pytest.mark.parametrize("mixed", [False, True])
def test_rows_of_a_run_of_phases(
    mode: str, packing: str, mixed: bool, tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is the one that the run is fed, of the length of its phase."""
    alone = {"kind": "jsonl", "paths": [str(path)], "id_key": "id"}
    both = {"kind": "mixture", "sources": [{"source": alone, "name": name, "weight": n} for name, n in (("a", 1.0), ("b", 0.3))]}
    source = ["--data.source", toml_value(both if mixed else alone), "--data.tokenizer", "bytes"]
    phases = ["--training.phases", "[{steps = 2, seq_len = 8, global_batch_size = 6}, {steps = 1, seq_len = 16, global_batch_size = 6}]"]
    sizes = ["--training.seq_len", "32", "--training.global_batch_size", "3", "--training.local_batch_size", "3"]
    data = ["--data.mode", mode, "--data.packing", packing, "--data.limit_documents", "0"]
    config = [*source, *phases, *sizes, "--debug.seed", "5", *data]
    table = {"source": both if mixed else alone, "mode": mode, "packing": packing}
    earlier = [Phase(8, 6, 3, 2), Phase(16, 6, 3, 1)]
    loader = loader_of(data_config(tmp_path / "cache", **table), rows=3, local=3, rank=0, degree=1, seq_len=32, seed=5, earlier=earlier)
    fed = [(int(batch.row_B[b]), batch.tokens_BT[b]) for batch in (next(loader) for _ in range(8)) for b in range(3)]
    tokenizer = BytesTokenizer(BytesConfig())
    for row, tokens in fed[4::5]:
        assert main(["data", "inspect", "--config", str(DEBUG_RUN), *config, "--row", str(row)]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert shown[0].startswith(f"row {row}: {len(tokens)} tokens, ")
        assert "".join(line for line in shown[1:] if not line.startswith("--- ")) == tokenizer.decode(tokens.numpy())
    assert {len(tokens) for _, tokens in fed[4::5]} == {8, 16, 32}


def test_phases_that_the_run_would_refuse(source: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    phases = ["--training.phases", "[{steps = 4, seq_len = 32, global_batch_size = 8}]", "--training.seq_len", "64"]
    arguments = ["--config", str(DEBUG_RUN), *source, *phases, "--data.packing", "padded", "--row", "0"]
    assert main(["data", "inspect", *arguments]) == 2
    assert "shorter rows, parts of these, would be padding alone; use best_fit or concat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--row", "1"], "--row wants a number from 0, the split train, and a length"),
        (["--row", "1", "--seq-len", "8"], "--row wants the seed"),
        (["--row", "1", "--seq-len", "8", "--data.mode", "streamed"], "or the number of streams by --data.streams"),
        (["--seq-len", "8", "--data.mode", "streamed", "--data.packing", "best_fit"], "depends on how many there are: give --config, or"),
        (["--data.sourse", "corpus"], "unknown key; did you mean 'source'?"),
        (["--split", "validation"], "holds nothing out"),
    ],
)
def test_what_inspect_refuses(arguments: list[str], message: str, source: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", *source, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_inspect_counts_what_packing_does(source: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of 20 documents of 25 or 26 tokens, a row of 60 holds two."""
    lengths = [len(text) + 1 for text in TEXTS]
    for kind, rows, cut, real in (("best_fit", 10, 0, sum(lengths)), ("padded", 20, 0, sum(lengths))):
        assert main(["data", "inspect", *source, "--data.packing", kind, "--seq-len", "60", "--documents", "0"]) == 0
        assert capsys.readouterr().out.splitlines()[2] == (
            f"packing {kind}, 60 tokens a row: {rows} rows an epoch, {real / (60 * rows):.2%} real tokens, "
            f"{(real - 20) / (60 * rows):.2%} targets; {cut} documents cut (0.00%), 0 tokens in no row"
        )


def test_inspect_counts_groups_of_streams(source: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of 5 documents each, with the place of a row left in every group."""
    arguments = ["--data.mode", "streamed", "--data.packing", "best_fit", "--data.streams", "4", "--seq-len", "60", "--documents", "0"]
    assert main(["data", "inspect", *source, *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("packing best_fit, 60 tokens a row: 12 rows an epoch, ")


def test_inspect_shows_a_mixture(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = f'{{kind = "jsonl", paths = ["{path}"]}}'
    source = (
        f'{{kind = "mixture", sources = [{{source = {one}, weight = 3}}, {{source = {one}, schedule = [[0, 1], [50, 2]], name = "b"}}]}}'
    )
    arguments = ["--data.source", source, "--data.tokenizer", "bytes"]
    assert main(["data", "inspect", *arguments, "--documents", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "jsonl-0: weight 3 at row 0; repeat at its end"
    assert lines[3] == "b: weight 1 at row 0, 2 at row 50; repeat at its end"
    assert lines[1] == lines[4]
    assert main(["data", "inspect", *arguments, "--row", "5", "--seq-len", "16", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("row 5: 16 tokens, ")
    assert main(["data", "prepare", *arguments, "--out", "x"]) == 2
    assert "prepare each source of the mixture by itself" in capsys.readouterr().err
