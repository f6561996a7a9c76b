"""How fast rows are made: of prepared tokens, by packing; of text, against the tokenizer alone; and how soon a run's data go on.

    python -m benchmarks.loader                                       # a core, no workers; a few minutes
    python -m benchmarks.loader --tokens 200000 --batches 4 --rounds 2 --text-tokens 20000 --record ""

Prepared tokens are random, in documents of log-normal lengths (median 600 tokens), more than caches hold. Rows have 2,048
tokens, batches 32 rows, with positions, documents and the loader's state. Speeds are tokens per second of processor time, of
each call. Text is the package's corpus, in pieces of 4,096 characters and in whole documents; both sides tokenize as many tokens of
it, one document at a time: the tokenizer alone is the library's object, called for an array where it has such a call, or as it is
called by default, for a list. Going on is timed from nothing: a new loader, the state of row 10,000,000, the first batch.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sized
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
import torch

from benchmarks.measure import Comparison, call, compare, record
from titanarch.data.config import DataConfig
from titanarch.data.index_writer import IndexWriter
from titanarch.data.loader import build_loader
from titanarch.data.row_loader import RowLoader
from titanarch.data.split import SplitSource
from titanarch.data.tokenizers import Tokenizer, build_tokenizer
from titanarch.data.tokenizers.base import BUILTIN, file_bytes

SEQ_LEN, ROWS = 2048, 32
PIECE_CHARACTERS = 4096
FAR_ROW = 10_000_000


def prepared(folder: Path, tokenizer: Tokenizer, n_tokens: int, seed: int) -> Path:
    """A folder of ``n_tokens`` random tokens or a document more."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    with IndexWriter(folder, tokenizer) as writer:
        while writer.n_tokens < n_tokens:
            length = int(np.clip(draw.lognormal(np.log(600), 1.2), 8, 100_000))
            writer.add(f"d{writer.n_documents}", draw.integers(0, 8000, length, dtype=np.int32), 4 * length)
        writer.finish("random tokens")
    return folder


def loader_of(config: DataConfig, tokenizer: Tokenizer) -> RowLoader:
    """Of one rank that holds the whole batch at once."""
    return build_loader(
        config, tokenizer=tokenizer, seq_len=SEQ_LEN, global_batch_size=ROWS, local_batch_size=ROWS, dp_rank=0, dp_degree=1, seed=0
    )


def configs_of(folder: Path, tokenizer: Tokenizer, n_tokens: int) -> dict[str, DataConfig]:
    """What is timed of prepared tokens."""
    one = {"kind": "tokens", "path": str(prepared(folder / "one", tokenizer, n_tokens, 0))}
    other = {"kind": "tokens", "path": str(prepared(folder / "other", tokenizer, n_tokens // 4, 1))}
    mixture = {"kind": "mixture", "sources": [{"source": one, "weight": 0.7}, {"source": other, "weight": 0.3, "name": "other"}]}
    mixture["sources"][0]["name"] = "one"
    tables: dict[str, dict[str, Any]] = {
        **{packing: {"source": one, "packing": packing} for packing in ("concat", "best_fit", "padded")},
        "mixture": {"source": mixture},
        "mixture, best_fit": {"source": mixture, "packing": "best_fit"},
    }
    return {name: DataConfig.model_validate({"allow_repeat": True, **table}) for name, table in tables.items()}


def throughput(name: str, loader: RowLoader, *, n_batches: int, n_rounds: int) -> dict[str, Any]:
    """Tokens a second of processor time, of each of ``n_rounds`` calls of ``n_batches`` batches."""

    def read() -> None:
        for _ in range(n_batches):
            next(loader)
            loader.state_dict()

    read()
    n_tokens = n_batches * ROWS * SEQ_LEN
    samples = [call(read).cpu_seconds for _ in range(n_rounds)]
    speeds = [n_tokens / seconds for seconds in samples]
    print(f"{name}: {np.median(speeds) / 1e6:.1f} Mtokens/s of a core, {min(speeds) / 1e6:.1f} to {max(speeds) / 1e6:.1f}")
    return {"measured": "tokens a second", "rows": name, "tokens": n_tokens, "cpu_seconds": samples, "tokens_per_second": speeds}


def going_on(name: str, config: DataConfig, tokenizer: Tokenizer, *, n_rounds: int) -> dict[str, Any]:
    """Seconds until the first batch of row FAR_ROW or the step before it, from nothing."""
    state = loader_of(config, tokenizer).state_dict()
    row = FAR_ROW - FAR_ROW % ROWS
    if "mixture" in state:
        taken = loader_of(config, tokenizer)
        state |= taken.rows.state(row)  # type: ignore[attr-defined]
    return resumed(name, config, tokenizer, {**state, "phases": [[SEQ_LEN, row]]}, n_rounds=n_rounds)


def resumed(name: str, config: DataConfig, tokenizer: Tokenizer, state: dict[str, Any], *, n_rounds: int) -> dict[str, Any]:
    """Seconds until the first batch after ``state``, from nothing."""
    ((_, row),) = state["phases"]

    def resume() -> None:
        loader = loader_of(config, tokenizer)
        loader.load_state_dict(state)
        assert int(next(loader).row_B[0]) == row, "goes on elsewhere"

    samples = [call(resume).wall_seconds for _ in range(n_rounds)]
    print(f"{name}: on at row {row:,} after {np.median(samples):.3f} s, {max(samples):.3f} at most")
    return {"measured": "seconds to go on", "rows": name, "row": row, "wall_seconds": samples}


def write_pieces(path: Path, n_characters: int) -> Path:
    """The package's corpus in pieces of ``n_characters``; 0: in whole documents."""
    source = SplitSource(DataConfig(), "train")
    with path.open("w", encoding="utf-8") as file:
        for found in source.records():
            text = source.document(found).text
            size = n_characters or len(text)
            for place in range(0, len(text), size):
                file.write(json.dumps({"text": text[place : place + size], "id": f"{found.number}-{place}"}) + "\n")
    return path


def libraries() -> list[tuple[str, str, Callable[[str], Sized]]]:
    """The tokenizers of the package by the libraries' own calls: kind of ``data.tokenizer``, call, and the call."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=file_bytes(BUILTIN, "spm_unigram_8192.model"))
    pairs = tokenizers.Tokenizer.from_str(file_bytes(BUILTIN, "hf_bytebpe_8192.json").decode())
    return [
        ("sentencepiece", "to an array", pieces.encode_as_numpy),
        ("sentencepiece", "to a list", pieces.encode),
        ("hf", "to a list", lambda text: pairs.encode(text, add_special_tokens=False).ids),
        ("hf", "to a list without offsets", lambda text: pairs.encode_batch_fast([text], add_special_tokens=False)[0].ids),
    ]


def against_the_tokenizer(
    path: Path, kind: str, alone: tuple[str, Callable[[str], Sized]], *, rows: bool, n_tokens: int, n_rounds: int
) -> Comparison:
    """Streamed rows against encoding the same texts, ``n_tokens`` tokens each; a source begins anew where it ends.

    Without ``rows``, texts that are read and tokenized and no more, which is what any loader of them does.
    """
    source = {"kind": "jsonl", "paths": [str(path)]}
    config = DataConfig.model_validate({"source": source, "mode": "streamed", "allow_repeat": True, "tokenizer": {"kind": kind}})
    name, encode = alone
    texts = [record_["text"] for record_ in map(json.loads, path.read_text("utf-8").splitlines())]

    tokenizer = build_tokenizer(config.tokenizer)
    loader, source_texts, left = loader_of(config, tokenizer), read_texts(config), cycle(texts)
    n_batches = n_tokens // (ROWS * SEQ_LEN)

    def streamed() -> None:
        for _ in range(n_batches):
            next(loader)

    def tokenized(texts: Iterator[str], encode: Callable[[str], Sized], n_more: int) -> None:
        wanted = n_batches * ROWS * SEQ_LEN
        while wanted > 0:
            wanted -= len(encode(next(texts))) + n_more

    first = streamed if rows else lambda: tokenized(source_texts, tokenizer.encode_document, 0)
    what = "streamed rows of" if rows else "read and tokenized alone,"
    return compare((f"{what} {path.stem}", first), (f"{kind} alone, {name}", lambda: tokenized(left, encode, 1)), n_rounds=n_rounds)


def read_texts(config: DataConfig) -> Iterator[str]:
    """Those of the source, again and again."""
    while True:
        source = SplitSource(config, "train")
        yield from map(source.text, source.records())


def streamed_going_on(path: Path, tokenizer: Tokenizer, *, n_rounds: int) -> dict[str, Any]:
    """Seconds until the first batch, of streams that stand at the last documents of a plain file."""
    source = {"kind": "jsonl", "paths": [str(path)]}
    config = DataConfig.model_validate({"source": source, "mode": "streamed", "allow_repeat": True})
    *_, last = SplitSource(config, "train").records()
    fresh = loader_of(config, tokenizer)
    state = {**fresh.state_dict(), "phases": [[SEQ_LEN, FAR_ROW - FAR_ROW % ROWS]]}
    first = last.number - last.number % ROWS - ROWS  # streams stand at documents of their own
    places = {record_.number: record_.position for record_ in _from(config, first)}
    for stream, cursor in state["cursors"].items():
        number = first + int(stream)
        cursor |= {"epoch": 6000, "number": number, **places[number]._asdict(), "skip": 0}
    return resumed("streamed, plain file", config, tokenizer, state, n_rounds=n_rounds)


def _from(config: DataConfig, first: int) -> Iterator[Any]:
    return (record_ for record_ in SplitSource(config, "train").records() if record_.number >= first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="prepared tokens of the larger source")
    parser.add_argument("--batches", type=int, default=200, help="batches a call")
    parser.add_argument("--rounds", type=int, default=10, help="calls, and rounds of comparisons")
    parser.add_argument("--text-tokens", type=int, default=1_000_000, help="tokens of text a call")
    parser.add_argument("--record", default="loader", help="name in benchmarks/results; empty: none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer(DataConfig().tokenizer)
    with tempfile.TemporaryDirectory(prefix="loader-") as name:
        folder = Path(name)
        configs = configs_of(folder, tokenizer, options.tokens)
        results = [
            throughput(rows, loader_of(config, tokenizer), n_batches=options.batches, n_rounds=options.rounds)
            for rows, config in configs.items()
        ]
        results += [going_on(rows, config, tokenizer, n_rounds=options.rounds) for rows, config in configs.items()]
        pieces = write_pieces(folder / "pieces.jsonl", PIECE_CHARACTERS)
        results.append(streamed_going_on(pieces, tokenizer, n_rounds=options.rounds))
        for path in (pieces, write_pieces(folder / "whole documents.jsonl", 0)):
            calls = libraries()
            for rows, (kind, how, encode) in [(False, calls[0]), *((True, each) for each in calls)]:
                alone, n_tokens = (how, encode), options.text_tokens
                compared = against_the_tokenizer(path, kind, alone, rows=rows, n_tokens=n_tokens, n_rounds=options.rounds)
                print(compared.summary())
                results.append(compared)
    if options.record:
        print(record(options.record, results, settings={**vars(options), "seq_len": SEQ_LEN, "rows": ROWS}))


if __name__ == "__main__":
    main()
