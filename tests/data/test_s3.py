"""Data on S3 while the server fails and delays requests: nothing is lost."""

import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.test_remote import LINES, TEXTS, reading, small_ranges, source_of, texts
from tests.s3 import s3_server
from tests.train.runs import losses, train, train_and_kill, write_config
from titanarch.config.errors import ConfigError
from titanarch.data.listing import find_files
from titanarch.data.tokenizers import SentencePieceConfig, build_tokenizer

STREAMED = [
    *(
        "--data.mode",
        "streamed",
        "--data.source.kind",
        "jsonl",
        "--data.validation_fraction",
        "0.1",
        "--data.allow_repeat",
        "true",
        "--data.limit_documents",
        "0",
    ),
    *("--data.retry.initial_backoff_seconds", "0.01", "--data.retry.max_attempts", "30"),
    *("--training.steps", "12", "--checkpoint.interval", "2", "--lr_scheduler.kind", "constant", "--evaluation.enable", "false"),
]


def put(name: str, content: bytes) -> None:
    import s3fs

    s3fs.S3FileSystem().pipe_file(f"bucket/{name}", content)


def parquet(values: list[str]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), sink, row_group_size=40)
    return sink.getvalue()


def test_documents_come_in_order_through_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 % of the requests fail and 10 % are late, of listings and of ranges."""
    small_ranges(monkeypatch, 5000)
    with s3_server(monkeypatch) as server:
        put("shards/a.jsonl", LINES)
        put("shards/b.jsonl.gz", gzip.compress(LINES))
        put("c.parquet", parquet(TEXTS))
        server.failing, server.slow = 0.3, 0.1
        waits: list[float] = []
        reads = reading(waits, max_attempts=30)
        assert texts(source_of(reads, kind="jsonl", paths=["s3://bucket/shards/*"])) == TEXTS * 2
        assert texts(source_of(reads, kind="parquet", paths=["s3://bucket/c.parquet"])) == TEXTS
        assert server.counts["failed"] > 5
        assert server.counts["slow"] > 3
        with pytest.raises(ConfigError, match=r"s3://bucket/none.jsonl: \[data.source\] paths: the file does not exist"):
            find_files(["s3://bucket/none.jsonl"], reading=reads)


def test_credentials_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(monkeypatch):
        put("a.jsonl", LINES)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        waits: list[float] = []
        with pytest.raises(ConfigError, match=r"s3://bucket/a.jsonl: .*redentials"):
            find_files(["s3://bucket/a.jsonl"], reading=reading(waits))
        assert waits == [], "they do not come by waiting"
        with pytest.raises(ConfigError, match=r"s3://bucket/a.model: .*cannot read the tokenizer: .*redentials"):
            build_tokenizer(SentencePieceConfig(path="s3://bucket/a.model"))


def test_a_streamed_run_killed_on_a_troubled_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are those of a run on a local copy that nothing disturbs."""
    (tmp_path / "shards").mkdir()
    shards = {f"{n:02d}.jsonl": [json.dumps({"text": f"{n} {text}" * 6}) for text in TEXTS[n::10]] for n in range(10)}
    for name, lines in shards.items():
        (tmp_path / "shards" / name).write_text("\n".join(lines))
    near, far = (write_config(tmp_path, name, tmp_path / "cache") for name in ("near", "far"))
    train(near, *STREAMED, "--data.source.paths", json.dumps([str(tmp_path / "shards" / "*.jsonl")]))
    with s3_server(monkeypatch) as server:
        for name, lines in shards.items():
            put(f"shards/{name}", "\n".join(lines).encode())
        server.failing, server.slow = 0.3, 0.1
        remote = [*STREAMED, "--data.source.paths", '["s3://bucket/shards/*.jsonl"]']
        train_and_kill(far, tmp_path / "far", 5, *remote)
        train(far, *remote)
        assert server.counts["failed"] > 5
    assert losses(tmp_path / "far") == losses(tmp_path / "near")
    assert len(losses(tmp_path / "far")) == 12
