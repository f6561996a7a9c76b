import json
import pickle
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

from titanarch.config.errors import ConfigError
from titanarch.data.tokenizers import TOKENIZERS, Tokenizer, build_tokenizer

TEXTS = [
    "",
    "plain words, and a number 1234.",
    " leading",
    "trailing  ",
    "   ",
    "two\n\nparagraphs\n",
    "tab\tand\rreturn\x00null",
    "é, 日本語, 🎉, \u00a0, \ufeff",
    "ends with </s> and <|endoftext|> and <unk> in it",
]
KINDS = ["bytes", "hf", "sentencepiece"]  # what comes with the package
FILES = resources.files("titanarch.data").joinpath("corpus", "tokenizers")


def build(value: Any) -> Tokenizer:
    return build_tokenizer(TOKENIZERS.resolve(value))


@pytest.mark.parametrize("kind", KINDS)
def test_decode_gives_the_text_back(kind: str) -> None:
    tokenizer = build(kind)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids
        assert ids.max(initial=0) < tokenizer.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_end_token_decodes_to_nothing(kind: str) -> None:
    tokenizer = build(kind)
    assert tokenizer.decode([*tokenizer.encode("a word"), tokenizer.eos_id]) == "a word"


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_ends_with_the_end_token_if_there_is_one(kind: str) -> None:
    tokenizer = build(kind)
    for eos_id, end in ((tokenizer.eos_id, [tokenizer.eos_id]), (None, [])):
        tokenizer.eos_id = eos_id
        for text in TEXTS:
            ids = tokenizer.encode_document(text)
            assert ids.dtype == np.int32
            assert ids.tolist() == [*tokenizer.encode(text).tolist(), *end]


@pytest.mark.parametrize("kind", KINDS)
def test_token_bytes_add_up_to_the_text(kind: str) -> None:
    tokenizer = build(kind)
    dummy = 1 if kind == "sentencepiece" else 0  # the space that SentencePiece puts before the first piece
    for text in filter(None, TEXTS):
        assert tokenizer.token_bytes(tokenizer.encode(text)).sum() == len(text.encode()) + dummy
    assert tokenizer.token_bytes(np.array([[tokenizer.eos_id]])).tolist() == [[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_process_gets_the_same_tokenizer(kind: str) -> None:
    tokenizer = build(kind)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.fingerprint, copy.vocab_size, copy.eos_id) == (tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id)
    assert copy.encode(TEXTS[1]).tolist() == tokenizer.encode(TEXTS[1]).tolist()


def test_ids_are_those_of_the_libraries() -> None:
    unigram = sentencepiece.SentencePieceProcessor(model_file=str(FILES / "spm_unigram_8192.model"))
    byte_bpe = tokenizers.Tokenizer.from_file(str(FILES / "hf_bytebpe_8192.json"))
    assert build("sentencepiece").encode(TEXTS[1]).tolist() == unigram.encode(TEXTS[1], out_type=int)
    assert build("hf").encode(TEXTS[1]).tolist() == byte_bpe.encode(TEXTS[1]).ids
    assert (build("sentencepiece").bos_id, build("sentencepiece").eos_id, build("sentencepiece").pad_id) == (1, 2, None)


@pytest.mark.parametrize("kind", ["sentencepiece", "hf"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_bad_file(kind: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer"
    if damage == "truncated":
        path.write_bytes((FILES / ("spm_unigram_8192.model" if kind == "sentencepiece" else "hf_bytebpe_8192.json")).read_bytes()[:5000])
    with pytest.raises(ConfigError, match="cannot read" if damage == "missing" else "is not a") as error:
        build({"kind": kind, "path": str(path)})
    assert str(path) in str(error.value)


def test_unknown_end_token_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no token '<eos>'.*<\|endoftext\|>"):
        build({"kind": "hf", "eos_token": "<eos>"})


def test_hf_without_byte_lengths(tmp_path: Path) -> None:
    description = json.loads((FILES / "hf_bytebpe_8192.json").read_text(encoding="utf-8"))
    description["pre_tokenizer"], description["decoder"] = {"type": "Whitespace"}, None
    path = tmp_path / "words.json"
    path.write_text(json.dumps(description))
    with pytest.raises(ConfigError, match="bytes a token"):
        build({"kind": "hf", "path": str(path)}).token_bytes(np.array([1]))


def test_hf_own_truncation_is_off(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer.from_file(str(FILES / "hf_bytebpe_8192.json"))
    model.enable_truncation(4)
    model.enable_padding(length=50)
    model.save(str(tmp_path / "short.json"))
    ids = build({"kind": "hf", "path": str(tmp_path / "short.json")}).encode(TEXTS[1])
    assert ids.tolist() == build("hf").encode(TEXTS[1]).tolist()
