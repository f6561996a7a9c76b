"""``titanarch data train-tokenizer``: a tokenizer of one's own, from the documents of a source."""

import argparse
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titanarch.config.errors import ConfigError, Problem
from titanarch.data.config import DataConfig
from titanarch.data.errors import data_error
from titanarch.data.sources import SOURCES, Document, MixtureConfig, Split, TokensConfig
from titanarch.data.split import SplitSource, has_validation
from titanarch.data.tokenizers import TOKENIZERS, build_tokenizer
from titanarch.data.train_tokenizer import TABLES, TRAINERS, TokenizerKind, sample_texts, sentences

DEFAULT_BYTES = 128 << 20
HELD_OUT_BYTES = 8 << 20
KIND_OF_SUFFIX = {".jsonl": "jsonl", ".json": "jsonl", ".txt": "text", ".md": "text", ".parquet": "parquet"}


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments beside those of a configuration."""
    parser.usage = (
        f"{parser.prog} (--config FILE | --input FILE ... | --data.key VALUE ...) --kind KIND --vocab-size N --out PATH "
        "[--max-bytes N] [--seed N]"
    )
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="FILE",
        help="in place of data.source, files or globs: .jsonl, .txt or .parquet, packed or not",
    )
    parser.add_argument("--kind", choices=sorted(TRAINERS), required=True, help="sentencepiece: a unigram model; hf-bpe: a byte-level BPE")
    parser.add_argument("--vocab-size", type=int, required=True, help="tokens, those for bytes and the end of a document included")
    parser.add_argument("--out", type=Path, required=True, help="the file to write; must not exist")
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=DEFAULT_BYTES,
        help=f"most text to train on; more is sampled by document (default {DEFAULT_BYTES:,})",
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the sample (default 0)")


def run(config: DataConfig, args: argparse.Namespace) -> None:
    """Train, write the file, and print what it is and how to use it. Raises ConfigError."""
    kind: TokenizerKind = args.kind
    _check(args)
    config = _with_input(config, args.input)
    if isinstance(config.source, MixtureConfig | TokensConfig):
        raise ConfigError(
            Problem(f"a tokenizer is trained on text, not on a source '{config.source.kind}'; name one of text", key="data.source")
        )
    own_split = has_validation(config) and not isinstance(config.validation, TokensConfig)
    sample = sample_texts(_documents(config, "train"), max_bytes=args.max_bytes, seed=args.seed, hold_out=not own_split)
    content = TRAINERS[kind](sample.training, args.vocab_size, args.seed)
    _write(args.out, content)
    n_bytes = sum(len(text.encode()) for text in sample.training)
    n_sentences = f" as {sum(1 for _ in sentences(sample.training)):,} sentences" if kind == "sentencepiece" else ""
    limits = f"--max-bytes {args.max_bytes:,}, --seed {args.seed}"
    print(f"trained on {len(sample.training):,} of {sample.n_documents:,} documents, {n_bytes:,} bytes{n_sentences} ({limits})")
    held_out = sample.held_out
    if own_split:
        held_out = sample_texts(_documents(config, "validation"), max_bytes=HELD_OUT_BYTES, seed=args.seed, hold_out=False).training
    _print_use(args.out, kind, content, held_out)


def _check(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise data_error("exists already: remove it or choose another --out", file=args.out)
    if args.vocab_size < 1 or args.max_bytes < 1:
        raise ConfigError("--vocab-size and --max-bytes want numbers above 0")
    if not 0 <= args.seed < 1 << 32:
        raise ConfigError(f"--seed {args.seed}: a seed is 0 to 2^32 - 1")


def _with_input(config: DataConfig, paths: list[str]) -> DataConfig:
    """``config`` with the files of ``--input`` as its source, of the kind that their suffix tells."""
    if not paths:
        return config
    names = [path.removesuffix(".gz").removesuffix(".zst") for path in paths]
    kinds = {KIND_OF_SUFFIX.get(Path(name).suffix) for name in names}
    kind = kinds.pop()
    if kinds or kind is None:
        known = ", ".join(KIND_OF_SUFFIX)
        raise ConfigError(
            f"--input {' '.join(paths)}: files of one kind, known by their suffix ({known}), or --data.source for anything else"
        )
    table: dict[str, Any] = {"source": SOURCES.resolve({"kind": kind, "paths": paths}), "validation": None, "validation_fraction": 0.0}
    return config.model_copy(update=table)


def _documents(config: DataConfig, split: Split) -> Iterator[Document]:
    source = SplitSource(config, split)
    return (source.document(record) for record in source.records())


def _write(path: Path, content: bytes) -> None:
    """All or nothing, and over nothing that came there meanwhile."""
    staging = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staging.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(staging, path)
    except OSError as error:
        raise data_error(f"cannot be written: {error.strerror or error}; choose another --out", file=path) from error
    finally:
        staging.unlink(missing_ok=True)


def _print_use(path: Path, kind: TokenizerKind, content: bytes, held_out: list[str]) -> None:
    tokenizer = build_tokenizer(TOKENIZERS.resolve({"kind": TABLES[kind], "path": str(path)}))
    print(f"{path}: {tokenizer.vocab_size:,} tokens, {len(content):,} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")
    n_tokens, n_bytes = sum(len(tokenizer.encode(text)) for text in held_out), sum(len(text.encode()) for text in held_out)
    if n_tokens:
        print(f"{n_bytes / n_tokens:.3f} bytes a token on {len(held_out):,} held-out documents ({n_bytes:,} bytes)")
    else:
        print("bytes a token: not measured, there is no held-out text")
    print(f'to use it:\n\n[data]\ntokenizer = {{ kind = "{TABLES[kind]}", path = {json.dumps(str(path))} }}')
