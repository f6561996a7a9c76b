"""Remote files over storage that fails: nothing is lost, nothing is read twice, and what cannot be read says where and why."""

import errno
import gzip
import json
import random
import threading
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.common import data_config, make_texts
from tests.data.test_sources import read
from tests.data.unreliable import Unreliable, unreliable, web_server
from titanarch.config.errors import ConfigError
from titanarch.data.errors import UnreachableFile
from titanarch.data.files import ByteStream
from titanarch.data.listing import find_files
from titanarch.data.read_ahead import ReadAhead
from titanarch.data.retry import Reading, RetryConfig, is_final
from titanarch.data.sources import SOURCES, Position, TextSource
from titanarch.data.split import SplitSource
from titanarch.data.tokenizers import SentencePieceConfig, build_tokenizer

TEXTS = make_texts(300)
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def reading(waits: list[float], **table: Any) -> Reading:
    """Reads that do not wait, but note for how long they would have; jitter is half."""
    return Reading(RetryConfig(**table), sleep=lambda seconds, closing: waits.append(seconds), draw=lambda: 0.5)


def source_of(reads: Reading, **table: Any) -> TextSource:
    config = SOURCES.resolve(table)
    source = SOURCES.of(config)(config, reads)
    assert isinstance(source, TextSource)
    return source


def texts(source: TextSource) -> list[str]:
    return [document.text for _, document in read(source)]


def failing(numbers: Callable[[int], bool], error: Exception) -> Callable[[int, bytes], bytes]:
    def fault(number: int, content: bytes) -> bytes:
        if numbers(number):
            raise error
        return content

    return fault


def small_ranges(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    monkeypatch.setattr("titanarch.data.remote.RANGE_BYTES", n_bytes)
    monkeypatch.setattr("titanarch.data.remote.SMALLEST_RANGE_BYTES", n_bytes)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_read_goes_on_where_it_broke(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_ranges(monkeypatch, 1000)
    draw, waits = random.Random(2), []
    content = gzip.compress(LINES) if name.endswith(".gz") else LINES
    faults = [lambda content: content, lambda content: content[: len(content) // 2], None]

    def fault(number: int, content: bytes) -> bytes:
        chosen = draw.choice(faults)
        if chosen is None:
            raise ConnectionResetError("reset")
        return chosen(content)

    with unreliable(fault) as fs:
        fs.pipe_file(f"/{name}", content)
        assert texts(source_of(reading(waits, max_attempts=60), kind="jsonl", paths=[f"faulty://{name}"])) == TEXTS
        starts = [start for start, _ in Unreliable.ranges]
    assert sorted(starts) == starts, "never back to what was delivered"
    assert sorted(set(starts)) == list(range(0, len(content), 1000))
    assert len(waits) == len(starts) - len(set(starts)) > len(set(starts)) // 2


def test_backoff_doubles_up_to_its_cap_and_the_error_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    small_ranges(monkeypatch, 1000)
    waits: list[float] = []
    with unreliable(failing(lambda number: number >= 5, TimeoutError("no answer"))) as fs:
        fs.pipe_file("/a.jsonl", LINES)
        reads = reading(waits, max_attempts=6, initial_backoff_seconds=1.0, max_backoff_seconds=6.0)
        with pytest.raises(
            UnreachableFile, match=r"faulty://.*a.jsonl:\d+: cannot be read at byte 5000, after 6 attempts: TimeoutError: no a"
        ):
            texts(source_of(reads, kind="jsonl", paths=["faulty://a.jsonl"]))
    assert waits == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert Reading().backoff_seconds(1) < 0.5


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), FileNotFoundError("gone")])
def test_what_cannot_get_better_is_not_tried_again(error: Exception) -> None:
    waits: list[float] = []
    with unreliable(failing(lambda number: True, error)) as fs:
        fs.pipe_file("/a.jsonl", LINES)
        with pytest.raises(UnreachableFile, match="at byte 0, at the first attempt"):
            texts(source_of(reading(waits), kind="jsonl", paths=["faulty://a.jsonl"]))
    assert waits == []


def test_statuses_of_web_servers() -> None:
    class Answered(Exception):
        def __init__(self, status: int) -> None:
            self.status = status

    assert [is_final(Answered(status)) for status in (403, 404, 408, 416, 425, 429, 500, 503)] == [
        True, True, False, True, False, False, False, False,
    ]  # fmt: skip
    listing = FileNotFoundError("fsspec's word for any failure")
    listing.__cause__ = Answered(503)
    assert not is_final(listing)


@pytest.mark.parametrize("when", ["before", "during", "at the end"])
def test_a_file_replaced_meanwhile(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_ranges(monkeypatch, 1000)
    with unreliable(lambda number, content: content) as fs:

        def fault(number: int, content: bytes) -> bytes:
            if number == {"during": 3, "at the end": len(LINES) // 1000}.get(when):
                fs.pipe_file("/a.jsonl", LINES[::-1])
                if when == "during":
                    raise ConnectionResetError("reset")
            return content

        Unreliable.fault = staticmethod(fault)
        fs.pipe_file("/a.jsonl", LINES)
        source = source_of(reading([]), kind="jsonl", paths=["faulty://a.jsonl"], on_error="skip")
        if when == "before":
            fs.pipe_file("/a.jsonl", LINES + b"\n")
        with pytest.raises(ConfigError, match=r"faulty://.*a.jsonl: was replaced while the run had it: \d+ bytes, "):
            list(source.records(Position(), unreachable=True))


def test_parquet_over_failing_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_ranges(monkeypatch, 2000)
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=50)
    with unreliable(failing(lambda number: number % 3 == 1, ConnectionResetError("reset"))) as fs:
        fs.pipe_file("/a.parquet", (tmp_path / "a.parquet").read_bytes())
        source = source_of(reading([]), kind="parquet", paths=["faulty://a.parquet"])
        assert texts(source) == TEXTS
        Unreliable.fault = staticmethod(failing(lambda number: True, ConnectionResetError("reset")))
        with pytest.raises(UnreachableFile, match=r"a.parquet: cannot be read at byte \d+, after 8 attempts: ConnectionResetError: reset"):
            texts(source)


def test_reading_ahead_is_bounded_ordered_and_ends() -> None:
    made: list[int] = []

    def blocks() -> Any:
        for i in range(50):
            made.append(i)
            yield bytes([i]) * 100
        raise OSError("at the end")

    ahead = ReadAhead(blocks(), n_bytes=1000)
    deadline = time.monotonic() + 10
    while len(made) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 10, "1000 bytes are ten blocks"
    found = []
    with pytest.raises(OSError, match="at the end"):
        for block in ahead:
            found += block[:1]
    assert found == list(range(50))
    other = ReadAhead(blocks(), n_bytes=1000)
    next(other)
    other.close()
    assert "read_ahead" not in {thread.name for thread in threading.enumerate()}


def test_a_reader_given_up_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where its thread waits to try again."""
    small_ranges(monkeypatch, 1000)
    reads = Reading(RetryConfig(initial_backoff_seconds=1000, max_backoff_seconds=1000), draw=lambda: 1.0)
    with unreliable(failing(lambda number: number > 2, ConnectionResetError("reset"))) as fs:
        fs.pipe_file("/a.jsonl", LINES)
        stream = ByteStream(find_files(["faulty://a.jsonl"])[0], reading=reads)
        assert stream.readline() == LINES[: LINES.index(b"\n") + 1]
        begin = time.monotonic()
        stream.close()
    assert time.monotonic() - begin < 10
    assert "read_ahead" not in {thread.name for thread in threading.enumerate()}


def test_sections_reach_the_reader(tmp_path: Path) -> None:
    with unreliable(lambda number, content: content) as fs:
        fs.pipe_file("/a.jsonl", LINES)
        table = {"source": {"kind": "jsonl", "paths": ["faulty://a.jsonl"]}, "retry": {"max_attempts": 3}, "read_ahead_bytes": 7}
        source = SplitSource(data_config(tmp_path, **table), "train").source
    assert (source.reading.retry.max_attempts, source.reading.read_ahead_bytes) == (3, 7)


@pytest.mark.parametrize(("url", "extra"), [("s3://bucket/a", "s3"), ("gs://bucket/a", "gcs"), ("hf://datasets/a/b/c", "hf")])
def test_a_missing_package_is_named(url: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install it")

    monkeypatch.setattr("titanarch.data.listing.url_to_fs", missing)
    with pytest.raises(ConfigError, match=rf"{url}: .*install the extra: pip install 'titanarch\[{extra}\]'"):
        find_files([url])


def test_web_server_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 % of the answers are 503 or break off half-way; every document comes, in order."""
    small_ranges(monkeypatch, 2000)
    files = {"a.jsonl.gz": gzip.compress(LINES), "b.jsonl": LINES}
    with web_server(files, share=0.3) as (url, failures):
        waits: list[float] = []
        source = source_of(reading(waits, max_attempts=30), kind="jsonl", paths=[f"{url}/{name}" for name in files])
        assert texts(source) == TEXTS * 2
        assert {"cut", "GET"} <= set(failures)
        assert len(waits) >= failures.count("cut")
        with pytest.raises(ConfigError, match=r"none.jsonl: \[data.source\] paths: the file does not exist"):
            find_files([f"{url}/none.jsonl"], reading=reading([], max_attempts=30))


def test_web_server_without_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    small_ranges(monkeypatch, 2000)
    monkeypatch.setattr("tests.data.unreliable._Handler.ranges", False)
    with web_server({"a.jsonl": LINES}) as (url, _), pytest.raises(UnreachableFile, match="the server has no range reads; copy the file"):
        texts(source_of(reading([]), kind="jsonl", paths=[f"{url}/a.jsonl"]))


@pytest.mark.parametrize(("status", "word"), [(401, "Unauthorized"), (403, "Forbidden")])
def test_web_server_that_wants_credentials(status: int, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a file is not said to be missing."""
    monkeypatch.setattr("tests.data.unreliable._Handler.refused", {"a.jsonl": status})
    waits: list[float] = []
    said = rf"a.jsonl: \[data.source\] paths: the server does not give it, are credentials missing\? {status}.*{word}"
    with web_server({"a.jsonl": LINES}) as (url, _), pytest.raises(ConfigError, match=said):
        find_files([f"{url}/a.jsonl"], reading=reading(waits))
    assert waits == []


def test_a_tokenizer_behind_a_web_server_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("titanarch.data.tokenizers.base.Reading", lambda: reading(waits, max_attempts=30))
    model = (resources.files("titanarch.data") / "corpus" / "tokenizers" / "spm_unigram_8192.model").read_bytes()
    monkeypatch.setattr("tests.data.unreliable._Handler.refused", {"b.model": 403})
    with web_server({"a.model": model}, share=0.7, seed=1) as (url, _):
        here, there = (build_tokenizer(SentencePieceConfig(path=path)) for path in ("builtin", f"{url}/a.model"))
        assert here.fingerprint == there.fingerprint
        assert waits
        for path, said in ((f"{url}/none.model", "the file does not exist"), (f"{url}/b.model", "403.*Forbidden")):
            with pytest.raises(ConfigError, match=rf"{path}: \[data.tokenizer\] path: cannot read the tokenizer: {said}"):
                build_tokenizer(SentencePieceConfig(path=path))
    with pytest.raises(ConfigError, match=r"\[data.tokenizer\] path: Protocol not known: nonsense"):
        build_tokenizer(SentencePieceConfig(path="nonsense://a/b"))
