"""``titanarch data``: tokenize a source ahead of training, train a tokenizer, fetch a corpus, and look at what a run reads."""

import argparse
import sys
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, ValidationError

from titanarch.cli import data_fetch, data_tokenizer
from titanarch.cli.arguments import add_config_arguments, load_from_arguments
from titanarch.config.errors import ConfigError, Problem
from titanarch.config.explain import explain
from titanarch.config.merge import merge
from titanarch.config.overrides import COMMAND_LINE, FILE_OPTIONS, override_trees
from titanarch.config.section import Section
from titanarch.config.tree import Node, Origin
from titanarch.data.batch import Batch, make_batch
from titanarch.data.cache import open_mixture
from titanarch.data.card import card_text
from titanarch.data.config import DataConfig
from titanarch.data.errors import data_error
from titanarch.data.fixed import documents
from titanarch.data.index_writer import VERSION
from titanarch.data.indexed import IndexedData
from titanarch.data.layout import RunLayout
from titanarch.data.ledger_check import check_ledger
from titanarch.data.ledger_files import read_ledger
from titanarch.data.mixed_rows import training_rows
from titanarch.data.mixed_streams import MixedStreamReader, mixed_stream_windows
from titanarch.data.packing import Packing, PackingCounts, counts
from titanarch.data.phases import Phase, Phases
from titanarch.data.prepare import prepare
from titanarch.data.shuffle import Shuffle
from titanarch.data.sources import MixtureConfig, Split, TokensConfig
from titanarch.data.split import SplitSource, has_validation, opened_mixture
from titanarch.data.stream_groups import group_counts
from titanarch.data.streams import Cursor, StreamReader, stream_windows
from titanarch.data.tokenizers import Tokenizer, build_tokenizer
from titanarch.data.unfinished import resumable
from titanarch.train.check import check_phases
from titanarch.train.run_config import RunConfig


class _DataOnly(Section):
    """What a command line without a file may set."""

    data: DataConfig = Field(DataConfig(), description="what is read, and how")


class _Settings(NamedTuple):
    """What the command takes from a configuration; ``phases`` and ``seed`` are None without one of a run."""

    data: DataConfig
    phases: Phases | None = None
    seed: int | None = None


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    writing = actions.add_parser("prepare", help="tokenize a source into a folder that runs read directly", allow_abbrev=False)
    add_config_arguments(writing)
    writing.usage = f"{writing.prog} [--config FILE] [--data.key VALUE ...] --out DIR [--processes N]"
    writing.add_argument("--out", type=Path, required=True, help="the folder to write; must not exist")
    writing.add_argument("--processes", type=int, default=0, help="tokenizing processes; 0, the default: one a core for over 64 MB")
    training = actions.add_parser("train-tokenizer", help="train a tokenizer on the documents of a source", allow_abbrev=False)
    add_config_arguments(training)
    data_tokenizer.configure(training)
    fetching = actions.add_parser("fetch", help="build a corpus that is too large to come with the package", allow_abbrev=False)
    data_fetch.configure(fetching)
    looking = actions.add_parser("inspect", help="show documents, their lengths, and a row as the model sees it", allow_abbrev=False)
    add_config_arguments(looking)
    looking.usage = f"{looking.prog} [--config FILE] [--data.key VALUE ...] [--split NAME] [--documents N] [--row K]"
    looking.add_argument("--split", choices=("train", "validation"), default="train", help="the split to look at")
    looking.add_argument("--documents", type=int, default=10, help="how many documents to list")
    looking.add_argument("--row", type=int, help="a row of the run to decode, from 0")
    looking.add_argument("--seq-len", type=int, help="tokens of that row; default: the configuration's")
    looking.add_argument("--seed", type=int, help="the seed that orders the rows; default: the configuration's")
    looking.add_argument("--verify", action="store_true", help="read all tokens and compare their checksums")
    checking = actions.add_parser("ledger", help="check that a run used every row once; status 1 where it did not", allow_abbrev=False)
    checking.add_argument("run", type=Path, help="the folder of a run with data.ledger = true")


def run(args: argparse.Namespace) -> int:
    if args.action == "fetch":
        data_fetch.run(args)
        return 0
    if args.action == "ledger":
        return _ledger(args.run)
    settings = _settings(args)
    if args.action == "train-tokenizer":
        data_tokenizer.run(settings.data, args)
        return 0
    tokenizer = build_tokenizer(settings.data.tokenizer)
    if args.action == "prepare":
        _prepare(settings.data, tokenizer, args.out, args.processes)
    else:
        _inspect(settings, tokenizer, args)
    return 0


def _settings(args: argparse.Namespace) -> _Settings:
    """From the configuration file, or from ``--data.key`` alone where no file is named."""
    if any(argument.split("=")[0] in {f"--{name}" for name in FILE_OPTIONS} for argument in args.config_arguments):
        config = load_from_arguments(args, RunConfig).config
        if args.action == "inspect":
            check_phases(config)
        return _Settings(config.data, config.training.run_phases(1), config.debug.seed)
    empty = Node({}, Origin(COMMAND_LINE, None))
    tree = reduce(lambda base, over: merge(base, over, (_DataOnly,)), override_trees(args.config_arguments), empty)
    try:
        return _Settings(_DataOnly.model_validate(tree.plain()).data)
    except ValidationError as error:
        raise ConfigError(*explain(error, _DataOnly, tree)) from error


def _prepare(config: DataConfig, tokenizer: Tokenizer, out: Path, processes: int) -> None:
    """Write every split to a folder of its own in ``out``, all or nothing; what an earlier one was broken off at is gone on with."""
    if isinstance(config.source, MixtureConfig):
        raise ConfigError(Problem("prepare each source of the mixture by itself, and let the mixture name the folders", key="data.source"))
    if isinstance(config.source, TokensConfig):
        raise ConfigError(Problem("the source is prepared already; name a source of text", key="data.source"))
    if out.exists():
        raise data_error("exists already: remove it or choose another --out", file=out)
    splits: list[Split] = ["train"]
    if has_validation(config) and not isinstance(config.validation, TokensConfig):
        splits.append("validation")
    sources = {split: SplitSource(config, split) for split in splits}
    plan = [VERSION, {split: source.identity() for split, source in sources.items()}, tokenizer.fingerprint, tokenizer.eos_id]
    with resumable(out, plan) as staging:
        for split, source in sources.items():
            (staging / split).mkdir(exist_ok=True)
            prepare(source, tokenizer, staging / split, processes=processes, resumes=True)
        metas = {split: IndexedData(staging / split, tokenizer).meta for split in splits}
        (staging / "README.md").write_text(card_text(metas), encoding="utf-8")
    for split in splits:
        print(f"{out / split}: {_totals(IndexedData(out / split, tokenizer))}")
    print(f'use it with data.source = {{ kind = "tokens", path = "{out}" }} and the same data.tokenizer')


def _ledger(run_folder: Path) -> int:
    """Print what the ledger of a run says; 1 where something is wrong."""
    report = check_ledger(read_ledger(run_folder))
    print(f"{report.n_steps:,} steps, {report.n_rows:,} rows, {report.n_starts} starts; {report.n_again:,} steps were made again")
    for line in report.passes:
        print(line)
    skipped = f"{report.n_skipped:,} skipped by roll-backs, {report.n_not_made:,} in steps whose update was skipped"
    print(f"{report.n_lost:,} rows lost, {report.n_doubled:,} doubled; {skipped}; {report.n_unrecorded:,} steps not recorded")
    for problem in report.problems:
        print(f"wrong: {problem}")
    return 1 if report.problems else 0


def _totals(data: IndexedData) -> str:
    n_bytes = sum(data.document_bytes.tolist())
    return f"{data.n_documents:,} documents, {data.n_tokens:,} tokens, {n_bytes:,} bytes ({n_bytes / data.n_tokens:.2f} a token)"


def _inspect(settings: _Settings, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    if args.row is not None:
        batch = _row(settings, tokenizer, args)
        _print_row(batch, tokenizer)
        return
    seq_len = args.seq_len or (settings.phases.longest if settings.phases else 0)
    source = settings.data.source
    if args.split == "train" and isinstance(source, MixtureConfig):
        for name, part, data in zip(source.names, source.sources, open_mixture(settings.data, tokenizer), strict=True):
            weights = ", ".join(f"{weight:g} at row {row:,}" for row, weight in part.knots)
            print(f"{name}: weight {weights}; {part.at_end} at its end")
            _inspect_documents(data, settings, seq_len, args)
    else:
        _inspect_documents(documents(settings.data, args.split, tokenizer), settings, seq_len, args)


def _inspect_documents(data: IndexedData, settings: _Settings, seq_len: int, args: argparse.Namespace) -> None:
    """Totals, lengths, what packing makes of them where ``seq_len`` is not 0, and the first documents."""
    if args.verify:
        data.verify()
    lengths = np.diff(data.starts)
    low, p10, median, p90, high = np.percentile(lengths, (0, 10, 50, 90, 100)).astype(int)
    print(f"{args.split}: {_totals(data)}" + (", checksums right" if args.verify else ""))
    print(f"tokens a document: shortest {low:,}, p10 {p10:,}, median {median:,}, p90 {p90:,}, longest {high:,}")
    if args.split == "train" and seq_len:
        _print_packing(_packed(settings, data.starts, seq_len), settings.data.packing, seq_len)
    if args.documents:
        print(f"{'tokens':>10} {'bytes':>12}  document")
    for document, length in zip(data[: args.documents], lengths.tolist(), strict=False):
        print(f"{length:>10,} {document.n_bytes:>12,}  {document.id}")


def _packed(settings: _Settings, starts_D: np.ndarray, seq_len: int) -> PackingCounts:
    config = settings.data
    if config.mode == "indexed" or config.packing != "best_fit":
        return counts(config.packing, starts_D, seq_len=seq_len)
    n_streams = config.streams or (RunLayout(settings.phases, 0, 1).n_streams(0, n_workers=0) if settings.phases else 0)
    if not n_streams:
        raise ConfigError("what best_fit makes of streams depends on how many there are: give --config, or --data.streams")
    return group_counts(np.diff(starts_D), n_streams=n_streams, seq_len=seq_len)


def _print_packing(made: PackingCounts, packing: Packing, seq_len: int) -> None:
    """What the documents become as rows."""
    real, targets = made.real / max(1, made.places), made.targets / max(1, made.places)
    print(
        f"packing {packing}, {seq_len:,} tokens a row: {made.rows:,} rows an epoch, {real:.2%} real tokens, {targets:.2%} targets; "
        f"{made.cut:,} documents cut ({made.cut / made.documents:.2%}), {made.unused:,} tokens in no row"
    )


def _row(settings: _Settings, tokenizer: Tokenizer, args: argparse.Namespace) -> Batch:
    """Row ``args.row`` of the run, as a batch of one."""
    config, row, phases = settings.data, args.row, settings.phases
    seed = settings.seed if args.seed is None else args.seed
    if args.seq_len is not None and args.seq_len > 0:  # a run of rows of that length alone
        n_rows = phases.parts[-1].global_batch_size if phases else max(1, config.streams)
        phases = Phases.of([Phase(args.seq_len, n_rows, n_rows)])
    if args.split != "train" or row < 0 or phases is None or (args.seq_len is not None and args.seq_len < 1):
        raise ConfigError("--row wants a number from 0, the split train, and a length by --config or --seq-len")
    if config.mode == "streamed":
        if settings.phases is None and not config.streams:
            raise ConfigError("--row of streamed data wants --config, or the number of streams by --data.streams")
        if config.shuffle_documents and seed is None:
            raise ConfigError("--row wants the seed that shuffles the documents: debug.seed of --config, or --seed")
        return _streamed_row(config, tokenizer, phases, row, seed=seed or 0)
    if seed is None:
        raise ConfigError("--row wants the seed that orders the rows: debug.seed of --config, or --seed")
    return make_batch(training_rows(config, tokenizer, seq_len=phases.longest, seed=seed, phases=phases).read(row, 1))


def _streamed_row(config: DataConfig, tokenizer: Tokenizer, phases: Phases, row: int, *, seed: int) -> Batch:
    """Row ``row`` of streams, read up to there through the phases before."""
    mixture = config.source if isinstance(config.source, MixtureConfig) else None
    sources = opened_mixture(config, lambda alone: SplitSource(alone, "train")) if mixture else [SplitSource(config, "train")]
    n_streams = RunLayout(phases, 0, 1).n_streams(config.streams, n_workers=0)
    stream, cursor, rows = row % n_streams, (Cursor(),) * len(sources), list[Any]()
    ends = [phase.first_row for phase in phases.parts[1:]]
    for phase, end in zip(phases.parts, [*ends, row + 1], strict=True):
        readers = [
            StreamReader(
                source,
                tokenizer,
                seq_len=phase.seq_len,
                n_streams=n_streams,
                streams=[stream],
                cursors={stream: at},
                packing=config.packing,
                shuffle=Shuffle(config.shuffle_documents, seed),
            )
            for source, at in zip(sources, cursor, strict=True)
        ]
        first = phase.first_row + (stream - phase.first_row) % n_streams
        mixed = MixedStreamReader(mixture, readers, n_streams=n_streams, cursors={stream: cursor}, next_row=first) if mixture else None
        for _ in range(first, min(end, row + 1), n_streams):
            rows = [(mixed or readers[0]).next_row(stream)]
            cursor = rows[0].cursor if mixed else (rows[0].cursor,)
    return make_batch((mixed_stream_windows if mixture else stream_windows)(rows, np.array([row])))


def _print_row(batch: Batch, tokenizer: Tokenizer) -> None:
    """The text of each document in the row, under a line that says which tokens it has."""
    tokens, document = batch.tokens_BT[0].numpy(), batch.document_BT[0].numpy()
    print(f"row {int(batch.row_B[0])}: {len(tokens)} tokens, {int((batch.labels_BT != -100).sum())} of them with a target")
    for number in range(int(document[-1]) + 1):
        (places,) = np.nonzero(document == number)
        print(f"--- document {number}: tokens {places[0]} to {places[-1]} ---")
        sys.stdout.write(tokenizer.decode(tokens[places]) + "\n")
