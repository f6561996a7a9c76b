"""Files that are odd or wrong: each works, or is an error that names the file and the place in it."""

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.common import make_texts, run_steps, write_jsonl
from tests.data.test_sources import open_source, read
from titanarch.config.errors import ConfigError
from titanarch.data.config import DataConfig
from titanarch.data.errors import DamagedFile
from titanarch.data.sources import Position

TEXTS = make_texts(40)


def test_a_line_of_50_megabytes(tmp_path: Path) -> None:
    n_bytes = 50 * 10**6
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * n_bytes}) + "\n" + json.dumps({"text": "y"}) + "\n")
    source = open_source(kind="jsonl", paths=[str(path)])
    tracemalloc.start()
    lengths = [len(source.parse(position, record).text) for position, record in source.read(Position())]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == [n_bytes, 1]
    assert peak_bytes < 4.2 * n_bytes


def test_an_empty_file_among_good_ones(tmp_path: Path) -> None:
    for kind in ("jsonl", "text", "parquet"):
        for i, text in enumerate(("a", None, "b")):
            path = tmp_path / f"{i}.{kind}"
            if text is None:
                path.write_bytes(b"")
            elif kind == "parquet":
                pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
            else:
                path.write_text(text if kind == "text" else json.dumps({"text": text}))
        texts = [document.text for _, document in read(open_source(kind=kind, paths=[f"{tmp_path}/*.{kind}"]))]
        assert [text for text in texts if text] == ["a", "b"]


def test_parquet_damaged_inside(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": make_texts(3000)}), path, row_group_size=1000)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedFile, match=r"a.parquet: cannot be read, it is truncated, damaged or no parquet"):
        read(open_source(kind="parquet", paths=[str(path)]))


@pytest.mark.parametrize("mode", ["indexed", "streamed"])
def test_a_file_replaced_between_two_runs(mode: str, tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    """By one of the same size, as far as streams can tell; the same content anywhere is the same data."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    config = config_of(source={"kind": "jsonl", "paths": [str(path)]}, mode=mode)
    _, state = run_steps(config, None, steps=2, rows=4, local=4, degree=1)
    content = path.read_bytes()
    os.utime(path, ns=(1, 1))
    run_steps(config, state, steps=1, rows=4, local=4, degree=1)
    path.write_bytes(content.replace(b"the", b"eht"))
    with pytest.raises(ConfigError, match=r"have changed since the checkpoint|was replaced since the checkpoint"):
        run_steps(config, state, steps=1, rows=4, local=4, degree=1)


def test_links_are_followed_wherever_they_lead(tmp_path: Path) -> None:
    target = write_jsonl(tmp_path / "elsewhere.jsonl", TEXTS)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").symlink_to(target)
    source = open_source(kind="jsonl", paths=[f"{tmp_path}/in/*.jsonl"])
    assert [document.text for _, document in read(source)] == TEXTS
    assert source.stored_bytes == target.stat().st_size
    target.write_bytes(target.read_bytes() + b"\n")
    with pytest.raises(ConfigError, match=r"in/a.jsonl: was replaced while the run had it"):
        read(source)
    target.unlink()
    with pytest.raises(ConfigError, match=r"in/a.jsonl: .*the file does not exist"):
        open_source(kind="jsonl", paths=[f"{tmp_path}/in/*.jsonl"])


def test_a_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    """It could not be written into the card of what is made of it."""
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.txt")).write_text("a")
    with pytest.raises(ConfigError, match=r"\[data.source\] paths: the file's name is not UTF-8: rename it"):
        open_source(kind="text", paths=[f"{tmp_path}/*.txt"])
