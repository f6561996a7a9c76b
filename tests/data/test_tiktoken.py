"""Ranks of tiktoken against tiktoken itself, and files of ranks that are malformed."""

import base64
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from titanarch.config.dump import dump_toml
from titanarch.config.errors import ConfigError
from titanarch.data.tokenizers import TOKENIZERS, Tokenizer, build_tokenizer
from titanarch.data.tokenizers.tiktoken import read_ranks

PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
MERGED = [b" t", b"th", b"he", b" th", b" the", b"in", b"er", b"an", b"qu", b"ui", b"ck", b"\xe6\x97", b"\xe6\x97\xa5", b"  "]
TOKENS = [bytes([b]) for b in range(256)] + MERGED
END = {"<|endoftext|>": len(TOKENS), "<|pad|>": len(TOKENS) + 1}
TEXT = "the quick thinker's 12345 the  日本\n\n\t the <|endoftext|> in it’s"


def lines(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.fixture
def table(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "small.tiktoken").write_bytes(lines(TOKENS))
    return {"kind": "tiktoken", "path": str(tmp_path / "small.tiktoken"), "pattern": PATTERN, "special_tokens": END}


def build(table: dict[str, Any], **changed: Any) -> Tokenizer:
    return build_tokenizer(TOKENIZERS.resolve({**table, **changed}))


def test_ids_are_those_of_tiktoken(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build(table)
    from tiktoken import Encoding
    from tiktoken.load import load_tiktoken_bpe

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # it reads the file itself
    own = Encoding("own", pat_str=PATTERN, mergeable_ranks=load_tiktoken_bpe(table["path"]), special_tokens=END)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert ids.tolist() == own.encode_ordinary(TEXT)
    assert len(ids) < len(TEXT.encode())
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (own.n_vocab, len(TOKENS), None, None)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == TEXT
    assert tokenizer.token_bytes(ids).sum() == len(TEXT.encode())
    assert tokenizer.token_bytes(np.array(list(END.values()))).tolist() == [0, 0]
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.fingerprint, copy.encode(TEXT).tolist()) == (tokenizer.fingerprint, ids.tolist())


def test_the_fingerprint_is_of_ranks_pattern_and_special_tokens(table: dict[str, Any], tmp_path: Path) -> None:
    other, same = tmp_path / "other", tmp_path / "same"
    other.write_bytes(lines([*TOKENS[:-2], TOKENS[-1], TOKENS[-2]]))
    same.write_bytes(b"\n".join(reversed(lines(TOKENS).splitlines())))  # the order of lines means nothing
    renamed = {"<|end|>": len(TOKENS), "<|pad|>": len(TOKENS) + 1}
    changed = [{"path": str(other)}, {"pattern": PATTERN + r"|\d"}, {"special_tokens": renamed, "eos_token": "<|end|>"}]
    fingerprint = build(table).fingerprint
    assert build(table, path=str(same)).fingerprint == fingerprint
    assert len({fingerprint, *(build(table, **change).fingerprint for change in changed)}) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lines(TOKENS)[:-4], r"line 270|small.tiktoken:270"),
        (lines(TOKENS).replace(b" 300\n", b"\n") + b"YWJj\n", "271.*is not a token in base64 and its rank"),
        (lines(TOKENS) + b"Y!Jj 270\n", "271.*is not a token in base64"),
        (lines(TOKENS) + b"YWJj -1\n", "271.*is not a token in base64"),
        (lines(TOKENS) + b"YWJj 5\n", "271.*rank 5 again, after line 6"),
        (lines(TOKENS) + lines(TOKENS[:1]).replace(b" 0", b" 270"), "271.*the token .* again"),
        (lines(TOKENS[1:]), "1 of the 256 single bytes have none, such as 0x00"),
        (b"\x80\x03cos\nsystem\n", ":1.*is no file of ranks"),
        (b"", "256 of the 256 single bytes"),
    ],
)
def test_malformed_ranks_are_refused(content: bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_ranks(content, "small.tiktoken")


def test_ranks_and_special_tokens_leave_no_gap(table: dict[str, Any]) -> None:
    Path(table["path"]).write_bytes(lines(TOKENS[:-3]))  # cut at the end of a line
    with pytest.raises(ConfigError, match="no token has the id 267, and ids go on to 271: the file of ranks is truncated"):
        build(table)
    with pytest.raises(ConfigError, match="the id 3 is given to two tokens"):
        build(table, special_tokens={"<|endoftext|>": 3})


def test_bad_tables(table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no regular expression that tiktoken takes"):
        build(table, pattern="(")
    with pytest.raises(ValueError, match=r"eos_token: special_tokens has no '<\|end\|>'; did you mean '<\|pad\|>'"):
        build(table, eos_token="<|end|>")
    with pytest.raises(ConfigError, match="cannot read"):
        build(table, path=table["path"] + "x")
    with pytest.raises(ConfigError, match="name a file"):
        build(table, path="builtin")


def test_a_configuration_with_special_tokens_comes_back(table: dict[str, Any], tmp_path: Path) -> None:
    from titanarch.config.load import load_config
    from titanarch.data.config import DataConfig

    config = DataConfig.model_validate({"tokenizer": table})
    (tmp_path / "data.toml").write_text(dump_toml(config))
    assert load_config(tmp_path / "data.toml", [], DataConfig).config == config
