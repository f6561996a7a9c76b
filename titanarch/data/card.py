"""The card of prepared data: ``meta.json`` of each split for programs, and a README beside them for people."""

from collections.abc import Mapping
from pathlib import Path

from titanarch.data.checksums import sha256_of
from titanarch.data.index_writer import InputMeta, Meta
from titanarch.data.listing import is_local
from titanarch.data.sources import Split
from titanarch.data.split import SplitSource


def inputs_of(source: SplitSource) -> list[InputMeta]:
    """The files that a split was read from, with their checksums where they lie on this machine."""
    return [
        InputMeta(url=file.url, bytes=file.n_bytes, sha256=sha256_of(Path(file.url)) if is_local(file.url) else None)
        for file in source.source.files
    ]


def card_text(splits: Mapping[Split, Meta]) -> str:
    """The README of prepared data, by the meta of each split."""
    one = next(iter(splits.values()))
    lines = [
        "# Prepared tokens",
        "",
        f"Written by titanarch {one.titanarch}, `titanarch data prepare`. Each folder's meta.json holds the same for programs;",
        "`titanarch data inspect --verify` compares every checksum.",
        "",
        f"Tokenizer: {one.tokenizer.kind}, {one.tokenizer.vocab_size:,} tokens, fingerprint {one.tokenizer.fingerprint}.",
        "",
        "| split | documents | tokens | bytes of text | without text | of other splits | file | bytes | SHA-256 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, meta in splits.items():
        counts = f"| {name} | {meta.documents:,} | {meta.tokens:,} | {meta.bytes:,} | {meta.empty:,} | {meta.of_other_splits:,} |"
        for file, entry in meta.files.items():
            lines.append(f"{counts} {file} | {entry.bytes:,} | {entry.sha256} |")
            counts = "| | | | | | |"
    lost = [(name, skip) for name, meta in splits.items() for skip in meta.skipped]
    if lost:
        lines += [
            "",
            "Not read:",
            "",
            "| split | file | malformed documents | left before its end | reason |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [f"| {name} | {s.file} | {s.documents:,} | {'yes' if s.rest else 'no'} | {s.reason} |" for name, s in lost]
    lines += ["", "Read from:", "", "| split | file | bytes | SHA-256 |", "| --- | --- | --- | --- |"]
    for name, meta in splits.items():
        lines += [f"| {name} | {each.url} | {each.bytes:,} | {each.sha256 or 'not on this machine'} |" for each in meta.inputs]
    return "\n".join(lines) + "\n"
