"""Datasets as the ``datasets`` library streams them, here from folders laid out like those of the Hub."""

import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.common import make_texts, run_steps
from tests.data.test_remote import reading
from tests.data.test_sources import open_source, read
from titanarch.config.errors import ConfigError
from titanarch.data.config import DataConfig
from titanarch.data.sources import SOURCES, Position, TextSource

TEXTS = make_texts(60, seed=5)


def packed_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=7)
    return sink.getvalue()


def packed_lines(rows: list[dict[str, Any]]) -> bytes:
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {"parquet": packed_parquet, "jsonl.gz": packed_lines}


def write_dataset(folder: Path, ending: str = "parquet", texts: list[str] = TEXTS) -> Path:
    """Three shards of the training split."""
    rows = [{"text": text, "url": f"u{i}", "score": i} for i, text in enumerate(texts)]
    third = len(rows) // 3
    (folder / "data").mkdir(parents=True)
    for i in range(3):
        (folder / "data" / f"train-{i:05d}-of-00003.{ending}").write_bytes(WRITERS[ending](rows[i * third : (i + 1) * third]))
    return folder


@pytest.mark.parametrize("ending", WRITERS)
def test_documents_in_order_and_from_every_position(ending: str, tmp_path: Path) -> None:
    source = open_source(kind="huggingface", path=str(write_dataset(tmp_path, ending)), id_key="url")
    whole = read(source)
    assert [(document.id, document.text) for _, document in whole] == [(f"u{i}", text) for i, text in enumerate(TEXTS)]
    for number in range(0, len(whole), 7):
        assert read(source, whole[number][0]) == whole[number:]
    unnamed = read(open_source(kind="huggingface", path=str(tmp_path)))
    assert [document.id for _, document in unnamed][19:22] == ["train-00000:20", "train-00001:1", "train-00001:2"]


@pytest.mark.parametrize("mode", ["indexed", "streamed"])
def test_rows_are_those_of_other_sources(mode: str, tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    """Also from a state on, with other ranks and workers."""
    hub = {"kind": "huggingface", "path": str(write_dataset(tmp_path / "hub"))}
    files = {"kind": "parquet", "paths": [str(tmp_path / "hub" / "data" / "*.parquet")]}
    one, other = (config_of(source=source, mode=mode) for source in (files, hub))
    expected, _ = run_steps(one, None, steps=9, rows=6, local=6, degree=1, seq_len=16)
    first, state = run_steps(other, None, steps=4, rows=6, local=3, degree=1, seq_len=16)
    workers = 2 if mode == "streamed" else 0
    rest, _ = run_steps(other.model_copy(update={"workers": workers}), state, steps=5, rows=6, local=2, degree=1, seq_len=16)
    assert first | rest == expected


def test_reading_that_breaks_goes_on_at_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SOURCES.resolve({"kind": "huggingface", "path": str(write_dataset(tmp_path))})
    waits: list[float] = []
    source = SOURCES.of(config)(config, reading(waits))
    assert isinstance(source, TextSource)
    library, taken = type(source._rows).iter, []

    def breaking(self: Any, batch_size: int) -> Iterator[dict[str, Any]]:
        for row in library(self, batch_size):
            if len(taken) % 13 == 12:
                taken.append(None)
                raise ConnectionResetError("reset")
            taken.append(row)
            yield row

    monkeypatch.setattr(type(source._rows), "iter", breaking)
    assert [document.text for _, document in read(source)] == TEXTS
    assert len(waits) == taken.count(None) > 3


def test_bad_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_dataset(tmp_path / "hub"))

    def refusal(**table: Any) -> str:
        with pytest.raises(ConfigError) as error:
            read(open_source(**{"kind": "huggingface", "path": path, **table}))
        return str(error.value)

    assert f"{path}: [data.source] text_key: the dataset has no column 'txt'; did you mean 'text'?" in refusal(text_key="txt")
    assert f"{path}: [data.source] id_key: the dataset has no column 'uri'; did you mean 'url'?" in refusal(id_key="uri")
    assert "cannot be opened: Bad split: test. Available splits: ['train']" in refusal(split="test")
    assert "[data.source] path: cannot be opened" in refusal(path=str(tmp_path / "none"))
    assert "[data.source] path: cannot be opened: BuilderConfig 'en' not found" in refusal(name="en")
    assert "'score' must be a string, not 0" in refusal(text_key="score")
    shard = tmp_path / "hub" / "data" / "train-00001-of-00003.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:300] + bytes(200) + content[500:])
    assert f"datasets://{path}/train-00001-of-00003: row 1 cannot be read, the shard is damaged" in refusal()
    lenient = open_source(kind="huggingface", path=path, on_error="skip")
    kept = [record["text"] for _, record in lenient.records(Position(), unreachable=True)]
    assert kept == TEXTS[:20] + TEXTS[40:]
    assert [(skip.file[-20:], skip.rest) for skip in lenient.skips.files] == [("train-00001-of-00003", True)]
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "[data.source] kind: " in refusal()
    assert "pip install 'titanarch[datasets]'" in refusal()


def test_no_other_commit_is_taken_for_the_same_data(tmp_path: Path) -> None:
    before = open_source(kind="huggingface", path=str(write_dataset(tmp_path)))
    (tmp_path / "data" / "train-00002-of-00003.parquet").write_bytes(packed_parquet([{"text": "b", "url": "u", "score": 0}]))
    after = open_source(kind="huggingface", path=str(tmp_path))
    assert before.content() != after.content()
