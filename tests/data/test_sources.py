import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tests.data.common import make_texts, write_jsonl
from titanarch.config.errors import ConfigError
from titanarch.data.listing import find_files
from titanarch.data.sources import SOURCES, Document, Position, TextSource

TEXTS = make_texts(40)


def open_source(**table: Any) -> TextSource:
    config = SOURCES.resolve(table)
    source = SOURCES.of(config)(config)
    assert isinstance(source, TextSource)
    return source


def read(source: TextSource, start: Position = Position()) -> list[tuple[Position, Document]]:  # noqa: B008 - immutable
    return [(position, source.parse(position, record)) for position, record in source.read(start)]


def write_all(folder: Path) -> dict[str, dict[str, Any]]:
    """The same documents in every format: the tables of their sources."""
    half = len(TEXTS) // 2
    lines = [write_jsonl(folder / f"part{i}.jsonl", part).read_bytes() for i, part in enumerate((TEXTS[:half], TEXTS[half:]))]
    for i, content in enumerate(lines):
        (folder / f"part{i}.jsonl.gz").write_bytes(gzip.compress(content[:700]) + gzip.compress(content[700:]))  # two members
        pack = zstandard.ZstdCompressor().compress
        (folder / f"part{i}.jsonl.zst").write_bytes(pack(content[:700]) + pack(content[700:]))  # two frames
        texts = TEXTS[:half] if i == 0 else TEXTS[half:]
        (folder / f"part{i}.txt").write_text("\n<SEP>\n".join(texts), encoding="utf-8")
        table = pyarrow.table({"text": texts, "other": list(range(half))})
        pyarrow.parquet.write_table(table, folder / f"part{i}.parquet", row_group_size=7)
    for i, text in enumerate(TEXTS):
        (folder / f"one-{i:03d}.text").write_text(text, encoding="utf-8")
    return {
        "jsonl": {"kind": "jsonl", "paths": [str(folder / "part*.jsonl")]},
        "gzip": {"kind": "jsonl", "paths": [str(folder / "part0.jsonl.gz"), str(folder / "part*.gz")]},
        "zstandard": {"kind": "jsonl", "paths": [str(folder / "part*.zst")]},
        "separated": {"kind": "text", "paths": [str(folder / "part*.txt")], "separator": "\n<SEP>\n"},
        "a file each": {"kind": "text", "paths": [str(folder / "one-*.text")]},
        "parquet": {"kind": "parquet", "paths": [str(folder / "part*.parquet")]},
    }


@pytest.mark.parametrize("name", ["jsonl", "gzip", "zstandard", "separated", "a file each", "parquet"])
def test_documents_in_order_and_from_every_position(name: str, tmp_path: Path) -> None:
    source = open_source(**write_all(tmp_path)[name])
    whole = read(source)
    assert [document.text for _, document in whole] == TEXTS
    assert len({(document.id, position.file) for position, document in whole}) == len(TEXTS)
    for number, (position, _) in enumerate(whole):
        assert read(source, position) == whole[number:]
    if name != "a file each":
        assert source.stored_bytes_read == source.stored_bytes


@pytest.mark.parametrize(("name", "says"), [("a.jsonl", False), ("a.jsonl.gz", True)])
def test_a_packed_file_says_that_it_is_read_again(name: str, says: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    source = open_source(kind="jsonl", paths=[str(tmp_path / name)])
    with caplog.at_level("INFO"):
        whole = read(source)
        assert caplog.text == ""
        assert read(source, whole[5][0]) == whole[5:]
    assert (f"{tmp_path / name} is packed: its first {whole[5][0].offset} bytes are unpacked again" in caplog.text) == says


def test_remote_files(tmp_path: Path) -> None:
    """Through another file system of fsspec than the local one."""
    remote = fsspec.filesystem("memory")
    for path in (write_jsonl(tmp_path / "a.jsonl", TEXTS[:3]), write_jsonl(tmp_path / "b.jsonl", TEXTS[3:5])):
        remote.pipe_file(f"/remote/{path.name}", path.read_bytes())
    source = open_source(kind="jsonl", paths=["memory://remote/*.jsonl"], id_key="id")
    assert [document for _, document in read(source)] == [Document(f"d{i}", text) for i, text in zip([0, 1, 2, 0, 1], TEXTS, strict=False)]


def test_corpus_is_split_by_document() -> None:
    documents = [document for _, document in read(open_source(kind="corpus"))]
    sizes = {"train": [0, 0], "validation": [0, 0]}
    for document in documents:
        assert document.split is not None
        sizes[document.split][0] += 1
        sizes[document.split][1] += len(document.text.encode())
    assert sizes == {"train": [225, 14_843_270], "validation": [15, 1_146_327]}


def test_separator_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanarch.data.sources.text.BUFFER_BYTES", 3)
    path = tmp_path / "a.txt"
    path.write_text("ab--::--cd--::----::--efghijk")
    source = open_source(kind="text", paths=[str(path)], separator="--::--")
    assert [(position.offset, document.text) for position, document in read(source)] == [(0, "ab"), (8, "cd"), (22, "efghijk")]


def bad(content: bytes, path: Path, **table: Any) -> str:
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read(open_source(kind="jsonl", paths=[str(path)], **table))
    return str(error.value)


def test_malformed_lines_are_named(tmp_path: Path) -> None:
    good, path = b'{"text": "a"}\n', tmp_path / "a.jsonl"
    assert bad(good * 2 + b'{"text": "\xff"}\n', path).startswith(f"{path}:3: is not UTF-8")
    assert bad(good + b"\n" + b'{"text": "a}\n', path).startswith(f"{path}:3: is not JSON")
    assert bad(good + b"[1]\n", path).startswith(f"{path}:2: is no JSON object")
    assert bad(good + b'{"txt": "a"}\n', path).startswith(f"{path}:2: the object has no key 'text'; did you mean 'txt'?")
    assert bad(good + b'{"text": 5}\n', path).startswith(f"{path}:2: 'text' must be a string, not 5")
    assert bad(good + rb'{"text": "ab\ud83d"}', path).startswith(
        f"{path}:2: 'text' is no text: its character 2 is half of a surrogate pair, \\ud83d"
    )
    assert bad(good + b'{"text": "a", "more": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", path).startswith(
        f"{path}:2: is JSON beyond what is read: "
    )
    assert bad(good + b'{"text": "a", "more": ' + b"1" * 5000 + b"}", path).startswith(f"{path}:2: is JSON beyond what is read: ")
    assert bad(good, path, id_key="name").startswith(f"{path}:1: the object has no key 'name'")


@pytest.mark.parametrize(
    "line",
    [
        r'{"text": "half of a pair in another place", "other": "\ud83d"}',
        r'{"text": "\ud83d\ude00 \u0000 \/ \n"}',
        '{"text": "first", "text": "last"}',
        '{"text": "a", "score": NaN, "least": -Infinity, "big": 123456789012345678901234567890}',
        ' {"text": "spaces around"}\t',
        '{"text": "a", "nested": ' + "[" * 300 + "]" * 300 + "}",
    ],
)
def test_lines_mean_what_the_standard_library_says(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    assert [document.text for _, document in read(open_source(kind="jsonl", paths=[str(path)]))] == [json.loads(line)["text"]]


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert [document.text for _, document in read(open_source(kind="jsonl", paths=[str(path)]))] == ["a"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "changed", "garbage"])
def test_damaged_archives(suffix: str, damage: str, tmp_path: Path) -> None:
    content = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(3000)).encode()
    packed = gzip.compress(content) if suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress(content)
    middle = len(packed) // 2
    packed = {
        "cut": packed[:middle],
        "changed": packed[:middle] + bytes([packed[middle] ^ 255]) + packed[middle + 1 :],
        "garbage": packed + b"garbage at the end",
    }[damage]
    path = tmp_path / f"a.jsonl{suffix}"
    message = bad(packed, path)
    assert message.startswith(f"{path}:")
    assert "truncated or damaged" in message or "is not" in message  # what is unpacked before the damage shows may be garbage


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc|de\xfff")
    with pytest.raises(ConfigError, match=r"a.txt: is not UTF-8: .* at byte 6 "):
        read(open_source(kind="text", paths=[str(tmp_path / "a.txt")], separator="|"))


def test_parquet_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"txt": ["a"], "text": [None]}), path)
    with pytest.raises(ConfigError, match="no column 'body'"):
        read(open_source(kind="parquet", paths=[str(path)], text_key="body"))
    with pytest.raises(ConfigError, match=r"a.parquet:1: 'text' must be a string, not None"):
        read(open_source(kind="parquet", paths=[str(path)]))
    not_utf8 = pyarrow.StringArray.from_buffers(3, pyarrow.array([0, 3, 6, 7], "int32").buffers()[1], pyarrow.py_buffer(b"abcd\xffef"))
    pyarrow.parquet.write_table(pyarrow.table({"text": not_utf8}), path)
    with pytest.raises(ConfigError, match=r"a.parquet:2: 'text' is not UTF-8: invalid start byte at its byte 1"):
        read(open_source(kind="parquet", paths=[str(path)]))
    source = open_source(kind="parquet", paths=[str(path)], on_error="skip")
    found = [source.document(*item, unreachable=True) for item in source.read(Position())]
    assert [document and document.text for document in found] == ["abc", None, "f"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"a.parquet: cannot be read, it is truncated"):
        read(open_source(kind="parquet", paths=[str(path)]))


def test_parquet_names(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "name": ["x", "y"]}), tmp_path / "a.parquet")
    source = open_source(kind="parquet", paths=[str(tmp_path / "a.parquet")], id_key="name")
    assert [document for _, document in read(source)] == [Document("x", "a"), Document("y", "b")]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing.jsonl", "the file does not exist"),
        ("*.jsonl", "no file matches"),
        ("", "is a folder; name its files"),
    ],
)
def test_paths_that_name_no_file(pattern: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        find_files([f"{tmp_path}/{pattern}"])
    assert "[data.source] paths" in str(error.value)


def test_unknown_protocol() -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        find_files(["nonsense://bucket/file.jsonl"])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_reading_holds_little_in_memory(suffix: str, tmp_path: Path) -> None:
    line = json.dumps({"text": "words and more words " * 200}).encode() + b"\n"
    path = tmp_path / f"large.jsonl{suffix}"
    opened = open(path, "wb") if not suffix else gzip.open(path, "wb", compresslevel=1)  # noqa: SIM115
    with opened as file:
        for _ in range(30 * 2**20 // len(line)):
            file.write(line)
    source = open_source(kind="jsonl", paths=[str(path)])
    tracemalloc.start()
    n_documents = sum(len(source.parse(*item).text) > 0 for item in source.read(Position()))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_documents == 30 * 2**20 // len(line)
    assert peak_bytes < 8 * 2**20


@pytest.mark.parametrize("id_key", ["", "id"])
def test_the_text_alone_is_that_of_the_document(id_key: str, tmp_path: Path) -> None:
    """Of good lines, and of bad ones what is wrong with them."""
    path = tmp_path / "a.jsonl"
    lines = [
        '{"text": "naïve\\ud83d\\ude00\\n", "id": 7}', '{"text": "", "id": ""}', '\ufeff{"text": "marked", "id": "b"}', '{"text": "a"}',
        '{"text": 3, "id": "c"}',
        '["text"]', "7", '{"txt": "d", "id": "d"}', '{"text": "\\ud800", "id": "e"}', '{"text": "f", "id": "f"} x',
    ]  # fmt: skip
    path.write_text("\n".join(lines))
    source = open_source(kind="jsonl", paths=[str(path)], id_key=id_key)

    def outcome(read: Callable[[Position, bytes], str], record: tuple[Position, bytes]) -> str:
        try:
            return read(*record)
        except ConfigError as error:
            return f"refused: {error}"

    records = list(source.read(Position()))
    found = [outcome(source.text, record) for record in records]
    assert found == [outcome(lambda *record: source.parse(*record).text, record) for record in records]
    assert [text.startswith("refused") for text in found] == [False, False, True, bool(id_key), *[True] * 6]  # a mark begins a file alone
