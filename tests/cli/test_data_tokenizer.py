"""Training a tokenizer: the same file each time, a run's data load with it, and nothing is overwritten."""

import json
import sys
from pathlib import Path

import pytest

from tests.data.common import loader_of
from titanarch.cli.main import main
from titanarch.data.config import DataConfig
from titanarch.data.sources import Document
from titanarch.data.tokenizers import build_tokenizer
from titanarch.data.train_tokenizer import SENTENCE_BYTES, sample_texts, sentences

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SYLLABLES = ["ka", "to", "mi", "re", "su", "né", "日", "lo", "van", "der"]
TEXTS = [
    f"Chapter {i}.\n  " + " ".join(SYLLABLES[(i * j) % 10] + SYLLABLES[(i + j * j) % 10] + SYLLABLES[j % 7] for j in range(80)) + "."
    for i in range(120)
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def trained(path: Path, out: Path, kind: str, *more: str) -> int:
    return main(["data", "train-tokenizer", "--input", str(path), "--kind", kind, "--vocab-size", "330", "--out", str(out), *more])


@pytest.mark.parametrize("kind", ["sentencepiece", "hf-bpe"])
def test_trained_twice_it_is_the_same_and_data_load_with_it(
    kind: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained(path, tmp_path / "one", kind) == trained(path, tmp_path / "two", kind) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert f"{tmp_path}/one: 330 tokens, {(tmp_path / 'one').stat().st_size:,} bytes, SHA-256 " in shown
    assert "trained on 119 of 120 documents, " in shown
    assert "bytes a token on 1 held-out documents" in shown
    table = tomllib.loads(shown[shown.index("[data]") : shown.index("trained on", 10)])["data"]
    data = {**table, "source": {"kind": "jsonl", "paths": [str(path)]}, "cache_dir": str(tmp_path / "cache")}
    config = DataConfig.model_validate(data)
    tokenizer = build_tokenizer(config.tokenizer)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)
    batch = next(loader_of(config, rows=2, local=2, rank=0, degree=1))
    assert int(batch.tokens_BT.max()) < 330


def test_nothing_is_overwritten(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").write_text("mine")
    assert trained(path, tmp_path / "there", "hf-bpe") == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "there").read_text() == "mine"


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("sentencepiece", ["--vocab-size", "90000"], "cannot train a tokenizer of 90000 tokens: "),
        ("hf-bpe", ["--vocab-size", "90000"], "cannot train a tokenizer of 90000 tokens: the text gives "),
        ("hf-bpe", ["--vocab-size", "200"], "256 bytes and <|endoftext|> are tokens already"),
        ("hf-bpe", ["--max-bytes", "5"], "of 120 documents none fits into 5 bytes"),
        ("hf-bpe", ["--seed", "-1"], "a seed is 0 to"),
        ("hf-bpe", ["--input", "x.bin"], "files of one kind, known by their suffix"),
    ],
)
def test_what_is_refused(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, more: list[str], said: str) -> None:
    assert trained(path, tmp_path / "out", kind, *more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sample_is_drawn_by_the_seed_within_its_bytes() -> None:
    documents = [Document(str(i), f"{i:04d}" * 25) for i in range(400)]
    first, again, other = (sample_texts(documents, max_bytes=10_000, seed=seed, hold_out=True) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(first.training) + len(first.held_out) == 100
    assert len(first.held_out) == 1
    assert first.training == sorted(first.training)
    assert len({*first.training, *first.held_out}) == 100


def test_sentences_are_all_there_and_none_too_long() -> None:
    text = "One. Two; three?\n\nfour " + "日" * 20_000 + "."
    found = list(sentences([text]))
    assert found[:3] == ["One.", "Two;", "three?"]
    assert "".join(found[3:]) == "four " + "日" * 20_000 + "."
    assert max(len(each.encode()) for each in found) <= SENTENCE_BYTES
