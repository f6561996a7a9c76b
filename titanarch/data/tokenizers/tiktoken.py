"""Ranks of tiktoken: lines of a token in base64 and its rank, with the pattern and the special tokens that the file lacks."""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from titanarch.config.errors import ConfigError, Problem, did_you_mean, shown
from titanarch.config.registry import ComponentConfig
from titanarch.data.errors import data_error
from titanarch.data.tokenizers.base import BUILTIN, TOKENIZERS, Tokenizer, TokenizerConfig, file_bytes


class TiktokenConfig(TokenizerConfig):
    """Ranks of tiktoken. The file holds them alone, so the pattern and the special tokens are given here."""

    path: str = Field(description="the file of ranks, an fsspec URL: a line a token, its bytes in base64 and its rank")
    pattern: str = Field(
        description="regular expression that cuts text into pieces before bytes are merged, as tiktoken's pat_str", min_length=1
    )
    special_tokens: dict[str, Annotated[int, Field(ge=0)]] = Field(
        description="special tokens and their ids; with the ranks, ids have no gap"
    )
    eos_token: str = Field("<|endoftext|>", description="the special token that ends a document")
    bos_token: str = Field("", description="the special token that begins a text; empty: there is none")

    @model_validator(mode="after")
    def _known_tokens(self) -> "TiktokenConfig":
        for name, token in (("eos_token", self.eos_token), ("bos_token", self.bos_token)):
            if token not in self.special_tokens and (token or name == "eos_token"):
                raise ValueError(f"{name}: special_tokens has no '{token}'{did_you_mean(token, self.special_tokens)}")
        return self


@TOKENIZERS.register("tiktoken")
class TiktokenTokenizer(Tokenizer):
    """Byte pairs merged by rank, as the library tiktoken does. Text that spells a special token stays text."""

    Config: ClassVar[type[ComponentConfig]] = TiktokenConfig

    def __init__(self, config: TiktokenConfig) -> None:
        super().__init__(config)
        tiktoken = _tiktoken()
        if config.path == BUILTIN:
            raise data_error("no ranks of tiktoken come with the package: name a file", key="data.tokenizer.path")
        ranks = read_ranks(file_bytes(config.path, ""), config.path)
        self.vocab_size = _check_ids(ranks, config)
        try:
            self._model = tiktoken.Encoding(
                config.path, pat_str=config.pattern, mergeable_ranks=ranks, special_tokens=config.special_tokens
            )
        except ValueError as error:
            raise data_error(f"is no regular expression that tiktoken takes: {error}", key="data.tokenizer.pattern") from error
        self.eos_id = config.special_tokens[config.eos_token]
        self.bos_id = config.special_tokens[config.bos_token] if config.bos_token else None
        self.pad_id = None
        self.fingerprint = _fingerprint(ranks, config)
        self._ranks, self._special = ranks, frozenset(config.special_tokens.values())

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._model.encode_to_numpy(text, disallowed_special=())).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        special = self._special
        return self._model.decode([token for token in map(int, ids) if token not in special])

    def _byte_table(self) -> np.ndarray:
        table = np.zeros(self.vocab_size, dtype=np.int64)
        for token, rank in self._ranks.items():
            table[rank] = len(token)
        return table


def _tiktoken() -> Any:
    try:
        import tiktoken  # only where it is used: a run on another format does without it
    except ImportError as error:
        message = "tiktoken is not installed: `pip install titanarch[tiktoken]`, or use another kind"
        raise ConfigError(Problem(message, "data.tokenizer.kind")) from error
    return tiktoken


def read_ranks(content: bytes, path: str) -> dict[bytes, int]:
    """The rank of every token in a file of ranks. DataError names the line where it is malformed, or what it lacks."""
    ranks: dict[bytes, int] = {}
    seen: dict[int, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        token, rank = _read_line(line, path, number)
        if token in ranks or rank in seen:
            what = f"rank {rank} again, after line {seen[rank]}" if rank in seen else f"the token {shown(token)} again"
            raise data_error(f"has {what}", file=path, line=number, key="data.tokenizer.path")
        ranks[token], seen[rank] = rank, number
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        message = f"is no complete file of ranks: {len(lacking)} of the 256 single bytes have none, such as {lacking[0]:#04x}"
        raise data_error(message, file=path, key="data.tokenizer.path")
    return ranks


def _read_line(line: bytes, path: str, number: int) -> tuple[bytes, int]:
    fields = line.split()
    try:
        if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) > 9:
            raise ValueError("it wants two fields")
        token = base64.b64decode(fields[0], validate=True)
    except (ValueError, binascii.Error) as error:
        message = f"is no file of ranks, or is truncated: {shown(line)} is not a token in base64 and its rank"
        raise data_error(message, file=path, line=number, key="data.tokenizer.path") from error
    if not token:
        raise data_error("has an empty token", file=path, line=number, key="data.tokenizer.path")
    return token, int(fields[1])


def _check_ids(ranks: Mapping[bytes, int], config: TiktokenConfig) -> int:
    """How many ids there are; DataError where two tokens have one or an id has none, as in a file that is cut at a line."""
    ids = np.sort(np.array([*ranks.values(), *config.special_tokens.values()], dtype=np.int64))
    if len(twice := ids[1:][np.diff(ids) == 0]):
        raise data_error(f"the id {twice[0]} is given to two tokens", file=config.path, key="data.tokenizer.special_tokens")
    if len(missing := np.flatnonzero(ids != np.arange(len(ids)))):
        gap = int(missing[0])
        message = f"no token has the id {gap}, and ids go on to {ids[-1]}: the file of ranks is truncated, or special_tokens lacks some"
        raise data_error(message, file=config.path, key="data.tokenizer.special_tokens")
    return len(ids)


def _fingerprint(ranks: Mapping[bytes, int], config: TiktokenConfig) -> str:
    """Of ranks, pattern and special tokens: whatever changes an id."""
    digest = hashlib.sha256(json.dumps(["tiktoken", config.pattern, sorted(config.special_tokens.items())]).encode())
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %s\n" % (rank, base64.b64encode(token)))
    return digest.hexdigest()
