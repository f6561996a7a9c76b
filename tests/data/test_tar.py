"""Tar archives: samples by key, in order and from every position; nothing is taken out, and nothing is lost without a word."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.data.common import make_texts
from tests.data.test_cache import opened
from tests.data.test_sources import open_source, read
from titanarch.config.errors import ConfigError
from titanarch.data.config import DataConfig
from titanarch.data.sources import Position

TEXTS = make_texts(30)


def archive_of(members: Iterable[tuple[str, bytes | tarfile.TarInfo]]) -> bytes:
    """A tar of files, or of members as they are given."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return written.getvalue()


def samples() -> list[tuple[str, bytes | tarfile.TarInfo]]:
    """A sample a text, with members of no interest, long names that take headers of their own, and a folder."""
    members: list[tuple[str, bytes | tarfile.TarInfo]] = []
    for i, text in enumerate(TEXTS):
        key = f"./part/{'long' * 40 if i % 5 == 0 else ''}{i:03d}"
        members += [
            (f"{key}.jpg", b"\xff" * (700 * i)),
            (f"{key}.TXT", text.encode()),
            (f"{key}.json", json.dumps({"body": text}).encode()),
        ]
    folder = tarfile.TarInfo("part/folder")
    folder.type = tarfile.DIRTYPE
    return [("", folder), *members]


def write(path: Path, content: bytes) -> Path:
    packed = {".gz": gzip.compress, ".tgz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)(content)
    path.write_bytes(packed)
    return path


def bad(path: Path, content: bytes, **table: Any) -> str:
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read(open_source(kind="tar", paths=[str(path)], **table))
    return str(error.value)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.zst"])
@pytest.mark.parametrize("table", [{}, {"extension": "json", "text_key": "body"}], ids=["text", "json"])
def test_samples_in_order_and_from_every_position(suffix: str, table: dict[str, Any], tmp_path: Path) -> None:
    for i in range(2):
        write(tmp_path / f"a{i}{suffix}", archive_of(samples()))
    source = open_source(kind="tar", paths=[f"{tmp_path}/*{suffix}"], **table)
    whole = read(source)
    assert [document.text for _, document in whole] == TEXTS * 2
    assert whole[1][1].id == f"a0{suffix}:part/001"
    for number in range(0, len(whole), 7):
        position = whole[number][0]
        assert read(source, position) == whole[number:]
    assert source.stored_bytes_read == source.stored_bytes
    assert list(tmp_path.iterdir()) == [*tmp_path.glob("a?.*")], "nothing was taken out"


def test_names_that_lead_outside_are_keys(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in" / "a.tar", archive_of([("../out.txt", b"up"), (f"{tmp_path}/abs.txt", b"absolute")]))
    documents = [document for _, document in read(open_source(kind="tar", paths=[str(path)]))]
    assert [document.text for document in documents] == ["up", "absolute"]
    assert documents[0].id == "a.tar:../out"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "in"]


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "FIFOTYPE", "CHRTYPE"])
def test_links_and_devices_are_refused(kind: str, tmp_path: Path) -> None:
    member = tarfile.TarInfo("b.txt")
    member.type, member.linkname = getattr(tarfile, kind), "/etc/passwd"
    content = archive_of([("a.txt", b"a"), ("", member), ("c.txt", b"c")])
    message = bad(tmp_path / "a.tar", content)
    assert "a.tar: the member 'b.txt' is a " in message
    assert "(sample from byte 1024 of the archive)" in message
    source = open_source(kind="tar", paths=[str(tmp_path / "a.tar")], on_error="skip")
    found = [source.document(*item, unreachable=True) for item in source.read(Position())]
    assert [document and document.text for document in found] == ["a", None, "c"]


def test_malformed_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    assert "the sample 'a' has no member '.txt' (set data.source.extension)" in bad(path, archive_of([("a.cls", b"a")]))
    assert "the sample 'a' has two members '.txt'" in bad(path, archive_of([("a.txt", b"a"), ("a.txt", b"a")]))
    assert "the member 'a.txt' is not UTF-8: invalid start byte at its byte 1" in bad(path, archive_of([("a.txt", b"a\xff")]))
    as_json = {"extension": "json"}
    assert "'a.json' is not JSON" in bad(path, archive_of([("a.json", b"{")]), **as_json)
    assert "'a.json' is no JSON object but [1]" in bad(path, archive_of([("a.json", b"[1]")]), **as_json)
    assert "'a.json' has no key 'text'; did you mean 'txt'?" in bad(path, archive_of([("a.json", b'{"txt": "a"}')]), **as_json)
    assert "'text' of 'a.json' is no text: its character 1 is half" in bad(
        path, archive_of([("a.json", rb'{"text": "a\udead"}')]), **as_json
    )
    assert "'a.json' is not JSON: maximum recursion" in bad(path, archive_of([("a.json", b"[" * 10**5)]), **as_json)
    assert "'text' of 'a.json' must be a string, not 5" in bad(path, archive_of([("a.json", b'{"text": 5}')]), **as_json)


def test_truncated_and_damaged_archives(tmp_path: Path) -> None:
    """Cut at every block and inside, an archive never passes for a shorter one."""
    content = archive_of([(f"{i}.txt", b"x" * 700 * i) for i in range(4)])
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512
    for cut in [*range(256, end + 1, 256)]:
        message = bad(tmp_path / "a.tar", content[:cut])
        assert "a.tar: cannot be read on by byte " in message, cut
        assert "truncated, damaged or no tar" in message
    header = archive_of([("a.txt", b"a" * 512)]).index(b"ustar")
    assert "truncated, damaged" in bad(tmp_path / "a.tar", content[: 512 + header] + b"X" + content[512 + header + 1 :])
    assert "content follows the end" in bad(tmp_path / "a.tar", content + content)
    packed = gzip.compress(content)
    assert "a.tar.gz: cannot be read on, it is truncated or damaged" in bad(tmp_path / "a.tar.gz", packed[:-9])
    assert "no tar" in bad(tmp_path / "b.tar", b"plain text, and no archive" * 100)


def test_an_empty_file_among_good_ones(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", archive_of([("a.txt", b"a")]))
    (tmp_path / "b.tar").write_bytes(b"")
    write(tmp_path / "c.tar", archive_of([]))
    write(tmp_path / "d.tar", archive_of([("d.txt", b"d")]))
    assert [document.text for _, document in read(open_source(kind="tar", paths=[f"{tmp_path}/*.tar"]))] == ["a", "d"]


def test_names_that_are_not_utf8(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    """They are spelled out, so that they can be written down and hashed."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name in ("caf\xe9.txt", "tea.txt"):
            member = tarfile.TarInfo(name)
            member.size = 5
            archive.addfile(member, io.BytesIO(b"words"))
    path = write(tmp_path / "a.tar", written.getvalue())
    data = opened(config_of(source={"kind": "tar", "paths": [str(path)]}))
    assert [document.id for document in data] == ["a.tar:caf\\xe9", "a.tar:tea"]
    (tmp_path / "b.jsonl").write_text(r'{"text": "a", "name": "\ud83d"}')
    source = {"kind": "jsonl", "paths": [str(tmp_path / "b.jsonl")], "id_key": "name"}
    both = [
        opened(config_of(source=source, validation_fraction=fraction), split)
        for fraction, split in ((1e-9, "train"), (1 - 1e-9, "validation"))
    ]
    assert [data[0].id for data in both] == ["\\ud83d", "\\ud83d"]
