import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.common import joined_bytes, make_texts, write_jsonl
from titanarch.config.errors import ConfigError
from titanarch.data import prepare as preparing
from titanarch.data.cache import open_tokens
from titanarch.data.config import DataConfig
from titanarch.data.index_writer import FORMAT, VERSION, IndexWriter, staged
from titanarch.data.indexed import IndexedData
from titanarch.data.prepare import prepare
from titanarch.data.split import SplitSource
from titanarch.data.tokenizers import BytesConfig, BytesTokenizer, build_tokenizer

TEXTS = make_texts(50)
BYTES = BytesTokenizer(BytesConfig())


def written(folder: Path, *, shard_bytes: int = 1000) -> Path:
    folder.mkdir()
    with IndexWriter(folder, BYTES, shard_bytes=shard_bytes) as writer:
        for i, text in enumerate(TEXTS):
            writer.add(f"name {i} é", BYTES.encode(text), len(text.encode()))
        writer.finish("a test")
    return folder


@pytest.mark.parametrize("shard_bytes", [1, 1000, 1 << 30])
def test_what_was_written_is_read(shard_bytes: int, tmp_path: Path) -> None:
    data = IndexedData(written(tmp_path / "data", shard_bytes=shard_bytes), BYTES)
    n_shards = len(list((tmp_path / "data").glob("tokens-*.bin")))
    assert n_shards == {1: len(TEXTS), 1 << 30: 1}.get(shard_bytes, n_shards)
    tokens, begins = joined_bytes(TEXTS)
    assert set(data.starts.tolist()) == begins
    assert data.n_tokens == len(tokens)
    assert data.document_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert [(item.id, BYTES.decode(item.tokens), item.n_bytes) for item in data] == [
        (f"name {i} é", text, len(text.encode())) for i, text in enumerate(TEXTS)
    ]
    assert data[-1].id == f"name {len(TEXTS) - 1} é"
    draw = np.random.default_rng(0)
    for start in draw.integers(0, len(tokens), 200).tolist():
        n = int(draw.integers(0, len(tokens) - start + 1))
        np.testing.assert_array_equal(data.read(start, n), tokens[start : start + n])
    data.verify()


def test_first_documents_alone(tmp_path: Path) -> None:
    whole, part = (IndexedData(written(tmp_path / name, shard_bytes=500), BYTES) for name in "ab")
    part.first(20)
    assert len(part) == 20
    assert part.n_tokens == len(joined_bytes(TEXTS[:20])[0])
    assert part.fingerprint != whole.fingerprint
    assert whole.first(1000).n_documents == len(TEXTS)


def refused(folder: Path, tokenizer: Any = BYTES) -> str:
    with pytest.raises(ConfigError) as error:
        IndexedData(folder, tokenizer)
    return str(error.value)


def test_truncated_and_missing_files(tmp_path: Path) -> None:
    folder = written(tmp_path / "data")
    shard = folder / "tokens-00001.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    assert refused(folder).startswith(f"{shard}: is truncated: {len(content) - 2} bytes, not {len(content)}")
    shard.write_bytes(content + b"x")
    assert refused(folder).startswith(f"{shard}: is too long")
    shard.unlink()
    assert refused(folder).startswith(f"{shard}: is missing")
    (folder / "meta.json").unlink()
    assert "is missing: no prepared tokens here" in refused(folder)


def test_changed_content_is_found_by_verify(tmp_path: Path) -> None:
    folder = written(tmp_path / "data")
    content = bytearray((folder / "tokens-00000.bin").read_bytes())
    content[10] ^= 1
    (folder / "tokens-00000.bin").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokens-00000.bin: the content differs from the checksum"):
        IndexedData(folder, BYTES).verify()


def test_other_tokenizer(tmp_path: Path) -> None:
    message = refused(written(tmp_path / "data"), build_tokenizer(DataConfig().tokenizer))
    assert "the tokenizer does not match the prepared data: they were made with bytes" in message
    assert "the run has sentencepiece" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": VERSION + 1}, "update titanarch"),
        ({"version": 0}, "prepare the data again"),
        ({"format": "another"}, "does not describe prepared tokens"),
        ({"documents": "many"}, "is damaged"),
        (None, "is damaged"),
    ],
)
def test_other_meta(change: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "data") / "meta.json"
    text = path.read_text()
    assert json.loads(text)["format"] == FORMAT
    path.write_text(text[:100] if change is None else json.dumps({**json.loads(text), **change}))
    assert message in refused(path.parent)


def test_a_stranger_s_meta(tmp_path: Path) -> None:
    """Checksums that are right do not make it right."""
    folder = written(tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text())
    (tmp_path / "out.bin").write_bytes(b"12")
    entry = {"bytes": 2, "sha256": hashlib.sha256(b"12").hexdigest()}
    for name in ("../out.bin", str(tmp_path / "out.bin"), "tokens-/../../out.bin"):
        (folder / "meta.json").write_text(json.dumps({**meta, "files": {**meta["files"], name: entry}}))
        assert f"meta.json: names a file that is not of this folder, '{name}'" in refused(folder)
    (folder / "meta.json").write_text(json.dumps({**meta, "tokens": meta["tokens"] + 1}))
    assert "meta.json: does not fit the files beside it" in refused(folder)
    offsets = (10**6).to_bytes(8, "little") * (len(TEXTS) + 1)
    (folder / "offsets.bin").write_bytes(offsets)
    files = {**meta["files"], "offsets.bin": {"bytes": len(offsets), "sha256": hashlib.sha256(offsets).hexdigest()}}
    (folder / "meta.json").write_text(json.dumps({**meta, "files": files}))
    assert "meta.json: does not fit the files beside it" in refused(folder)


def test_staged_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "a") as staging:
        (staging / "file").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with staged(tmp_path / "a") as staging:
        (staging / "file").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_same_bytes_whatever_the_number_of_processes(
    tmp_path: Path, config_of: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "CHUNK_CHARACTERS", 300)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    config = config_of(source={"kind": "jsonl", "paths": [str(path)]}, tokenizer="sentencepiece")
    files = []
    for processes in (1, 2):
        folder = tmp_path / f"out{processes}"
        folder.mkdir()
        prepare(SplitSource(config, "train"), build_tokenizer(config.tokenizer), folder, processes=processes)
        files.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert files[0] == files[1]


def test_prepared_tokens_as_a_source(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    both, single = tmp_path / "both", tmp_path / "single"
    both.mkdir()
    for folder in (both / "train", both / "validation", single):
        written(folder)
    of = {name: config_of(source={"kind": "tokens", "path": str(tmp_path / name)}) for name in ("both", "single", "none")}
    assert open_tokens(of["both"], "validation", BYTES).folder == both / "validation"
    assert open_tokens(of["single"], "train", BYTES).folder == single
    limited = config_of(source={"kind": "tokens", "path": str(single)}, limit_documents=3, validation={"kind": "tokens", "path": str(both)})
    assert open_tokens(limited, "train", BYTES).n_documents == 3
    assert open_tokens(limited, "validation", BYTES).n_documents == len(TEXTS)
    with pytest.raises(ConfigError, match="holds nothing out"):
        open_tokens(of["single"], "validation", BYTES)
    with pytest.raises(ConfigError, match=r"\[data.source\] path: the folder does not exist; write it with `titanarch data prepare`"):
        open_tokens(of["none"], "train", BYTES)
    (both / "train" / "meta.json").unlink()
    with pytest.raises(ConfigError, match="have no train split"):
        open_tokens(of["both"], "train", BYTES)
    with pytest.raises(ConfigError, match="copy the folder to a local disk"):
        open_tokens(config_of(source={"kind": "tokens", "path": "memory://x"}), "train", BYTES)
