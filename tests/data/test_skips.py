"""on_error = "skip": what is lost is counted, told and recorded, and rows stay what they are for every reader and after every restart."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.data.common import make_texts, run_steps
from tests.data.test_cache import entries, opened, texts_of
from tests.data.test_sources import open_source
from tests.data.unreliable import unreliable
from titanarch.config.errors import ConfigError
from titanarch.data.config import DataConfig
from titanarch.data.errors import UnreachableFile
from titanarch.data.loader import build_loader
from titanarch.data.sources import Position
from titanarch.data.tokenizers import build_tokenizer

TEXTS = make_texts(2000)


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def damaged(folder: Path, suffix: str = ".gz", n: int = 2000) -> None:
    """``n`` texts: a good file, one with two malformed lines, one that lacks its last n bytes, an empty one, a good one."""
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    files = [
        pack(lines(TEXTS[:40])),
        pack(lines(TEXTS[40:50]) + b'{"text": 5}\n\xff\n' + lines(TEXTS[50:60])),
        pack(lines(TEXTS[60 : n - 100]))[:-n],
        b"",
        pack(lines(TEXTS[n - 100 : n])),
    ]
    for i, content in enumerate(files):
        (folder / f"{i}.jsonl{suffix}").write_bytes(content)


def table(folder: Path, suffix: str = ".gz", **more: Any) -> dict[str, Any]:
    return {"source": {"kind": "jsonl", "paths": [f"{folder}/*.jsonl{suffix}"], "on_error": "skip"}, **more}


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cache_says_what_it_lacks(
    suffix: str, tmp_path: Path, config_of: Callable[..., DataConfig], caplog: pytest.LogCaptureFixture
) -> None:
    damaged(tmp_path, suffix)
    config = config_of(**table(tmp_path, suffix))
    found = texts_of(config)
    rest = len(found) - 60 - 100
    assert 0 < rest < 1840, "what came before the damage is there"
    assert found == TEXTS[: 60 + rest] + TEXTS[1900:]
    one, other = opened(config).meta.skipped
    assert (Path(one.file).name, one.documents, one.rest, one.first_record) == (f"1.jsonl{suffix}", 2, False, 10)
    assert (Path(other.file).name, other.documents, other.rest, other.first_record) == (f"2.jsonl{suffix}", 0, True, rest - 1)
    assert "truncated or damaged" in other.reason
    assert caplog.text.count("passes over data") == 2, "a file is told of once"
    assert "lack 2 malformed documents and the rest of 1 files" in caplog.text
    assert build_of(config).skipped == (2, 1)
    stopping = config_of(**{**table(tmp_path, suffix), "source": {**table(tmp_path, suffix)["source"], "on_error": "stop"}})
    with pytest.raises(ConfigError, match=rf"1.jsonl{suffix}:11: 'text' must be a string"):
        opened(stopping)
    assert len(entries(tmp_path / "cache")) == 1, "the incomplete cache is not taken for a complete one"


def build_of(config: DataConfig) -> Any:
    tokenizer = build_tokenizer(config.tokenizer)
    return build_loader(config, tokenizer=tokenizer, seq_len=16, global_batch_size=4, local_batch_size=4, dp_rank=0, dp_degree=1, seed=3)


@pytest.mark.parametrize("packing", ["concat", "padded"])
def test_streamed_rows_are_the_same_for_all_and_after_restarts(packing: str, tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    """Resumes begin in the damaged file and after it."""
    damaged(tmp_path, n=400)
    config = config_of(**table(tmp_path), mode="streamed", packing=packing)
    n_steps = 100 if packing == "padded" else 30
    expected, _ = run_steps(config, None, steps=n_steps, rows=4, local=4, degree=1, seq_len=512)
    rows: dict[int, bytes] = {}
    state = None
    for steps, degree in ((n_steps // 3, 2), (n_steps // 3, 1), (n_steps - 2 * (n_steps // 3), 4)):
        part, state = run_steps(config, state, steps=steps, rows=4, local=1, degree=degree, seq_len=512)
        rows |= part
    assert rows == expected
    loader = build_of(config)
    while loader.skipped.files == 0:
        next(loader)
    assert loader.skipped == (2, 1)


def test_damage_shows_at_the_same_place_from_everywhere(tmp_path: Path) -> None:
    damaged(tmp_path)
    source = open_source(**table(tmp_path)["source"])
    whole = list(source.records(Position(), unreachable=False))
    for start in whole[:: len(whole) // 9]:
        again = list(source.records(start[0], unreachable=False))
        assert again == whole[len(whole) - len(again) :]
        assert again[0] == start


def test_storage_that_gives_up_is_skipped_where_one_process_reads(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    def fault(number: int, content: bytes) -> bytes:
        if b"gone" in content:
            raise PermissionError("denied")
        return content

    with unreliable(fault) as fs:
        for i, texts in enumerate((TEXTS[:5], ["gone"], TEXTS[5:9])):
            fs.pipe_file(f"/{i}.jsonl", lines(texts))
        source = {"kind": "jsonl", "paths": ["faulty://*.jsonl"], "on_error": "skip"}
        assert texts_of(config_of(source=source)) == TEXTS[:9]
        (skip,) = opened(config_of(source=source)).meta.skipped
        assert (skip.file, skip.documents, skip.rest) == ("faulty:///1.jsonl", 0, True)
        with pytest.raises(UnreachableFile, match=r"faulty:///1.jsonl:1: cannot be read at byte 0"):
            run_steps(config_of(source=source, mode="streamed"), None, steps=90, rows=2, local=2, degree=1)


def test_nothing_readable_is_an_error(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    (tmp_path / "0.jsonl.gz").write_bytes(gzip.compress(b"[]\n" * 5))
    for mode in ("indexed", "streamed"):
        with pytest.raises(ConfigError, match=r"the train split has no text"):
            run_steps(config_of(**table(tmp_path), mode=mode), None, steps=1, rows=2, local=2, degree=1)
