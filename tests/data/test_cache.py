import gzip
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.common import data_config, make_texts, write_jsonl
from titanarch.config.errors import ConfigError
from titanarch.data.cache import open_tokens
from titanarch.data.config import DataConfig
from titanarch.data.split import held_out
from titanarch.data.tokenizers import build_tokenizer

TEXTS = make_texts(60)


def opened(config: DataConfig, split: Any = "train") -> Any:
    return open_tokens(config, split, build_tokenizer(config.tokenizer))


def texts_of(config: DataConfig, split: Any = "train") -> list[str]:
    tokenizer = build_tokenizer(config.tokenizer)
    return [tokenizer.decode(document.tokens) for document in open_tokens(config, split, tokenizer)]


def jsonl(path: Path, **options: Any) -> dict[str, Any]:
    return {"source": {"kind": "jsonl", "paths": [str(path)]}, **options}


def entries(cache: Path) -> set[str]:
    return {path.name for path in (cache / "tokens").iterdir() if path.is_dir()} if (cache / "tokens").exists() else set()


def test_made_once_and_anew_when_anything_changes(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    path, cache = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    config = config_of(**jsonl(path))
    assert texts_of(config) == TEXTS
    (first,) = entries(cache)
    made = (cache / "tokens" / first / "meta.json").stat().st_mtime_ns
    assert texts_of(config) == TEXTS
    assert (cache / "tokens" / first / "meta.json").stat().st_mtime_ns == made
    assert texts_of(config_of(**jsonl(path), limit_documents=7)) == TEXTS[:7]
    assert texts_of(config_of(**jsonl(path), tokenizer="hf")) == TEXTS
    assert len(entries(cache)) == 3
    write_jsonl(path, TEXTS[::-1])
    os.utime(path, ns=(1, 1))
    assert texts_of(config) == TEXTS[::-1]
    assert len(entries(cache)) == 4


def test_held_out_documents(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    source = {"kind": "jsonl", "paths": [str(path)], "id_key": "id"}
    config = config_of(source=source, validation_fraction=0.3, limit_documents=20)
    chosen = [held_out(f"d{i}", 0.3) for i in range(len(TEXTS))]
    assert 5 < sum(chosen) < 35
    assert texts_of(config, "validation") == [text for text, out in zip(TEXTS, chosen, strict=True) if out]
    assert texts_of(config) == [text for text, out in zip(TEXTS, chosen, strict=True) if not out][:20]
    assert sum(held_out(str(i), 0.3) for i in range(20_000)) == pytest.approx(6000, abs=5 * (20_000 * 0.3 * 0.7) ** 0.5)


def test_validation_from_its_own_source(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    train, other = write_jsonl(tmp_path / "a.jsonl", TEXTS), write_jsonl(tmp_path / "b.jsonl", TEXTS[:9])
    validation = {"kind": "jsonl", "paths": [str(other)]}
    assert texts_of(config_of(**jsonl(train), validation=validation), "validation") == TEXTS[:9]
    with pytest.raises(ConfigError, match=r"holds nothing out: set data.validation_fraction"):
        opened(config_of(**jsonl(train)), "validation")
    missing = {"kind": "jsonl", "paths": [str(tmp_path / "none.jsonl")]}
    with pytest.raises(ConfigError, match=r"\[data.validation\] paths: the file does not exist"):
        opened(config_of(**jsonl(train), validation=missing), "validation")


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_empty_corpus(content: str, tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r"the train split has no text in .*a.jsonl"):
        opened(config_of(**jsonl(tmp_path / "a.jsonl")))
    assert entries(tmp_path / "cache") == set()


def test_truncated_source_leaves_no_cache(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS * 50).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain)[:-3000])
    with pytest.raises(ConfigError, match=r"a.jsonl.gz:\d+: cannot be read on, it is truncated"):
        opened(config_of(**jsonl(tmp_path / "a.jsonl.gz")))
    assert entries(tmp_path / "cache") == set()


def test_damaged_cache_is_made_again(tmp_path: Path, config_of: Callable[..., DataConfig], caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(**jsonl(write_jsonl(tmp_path / "a.jsonl", TEXTS)))
    opened(config)
    (entry,) = entries(tmp_path / "cache")
    tokens = tmp_path / "cache" / "tokens" / entry / "tokens-00000.bin"
    tokens.write_bytes(tokens.read_bytes()[:10])
    assert texts_of(config) == TEXTS
    assert "is truncated" in caplog.text


def _open_late(cache: Path, path: Path, begin: float, outcome: Any) -> None:
    config = data_config(cache, **jsonl(path))
    time.sleep(max(0.0, begin - time.time()))
    data = opened(config)
    outcome.put((data.n_tokens, data.folder.stat().st_ino))


def test_processes_racing_build_it_once(tmp_path: Path) -> None:
    path, context = write_jsonl(tmp_path / "a.jsonl", TEXTS * 30), multiprocessing.get_context("fork")
    outcome = context.Queue()
    stale = tmp_path / "cache" / "tokens"
    stale.mkdir(parents=True)
    begin = time.time() + 0.3
    processes = [context.Process(target=_open_late, args=(tmp_path / "cache", path, begin, outcome)) for _ in range(4)]
    for process in processes:
        process.start()
    results = {outcome.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(results) == 1, "every process opens the same folder, made once"
    assert len(entries(tmp_path / "cache")) == 1


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    config = config_of(**jsonl(write_jsonl(tmp_path / "a.jsonl", TEXTS)))
    folder = opened(config).folder
    leftover = folder.with_name(f"{folder.name}.tmp-1-abc")
    folder.rename(leftover)
    assert texts_of(config) == TEXTS
    assert not leftover.exists()


def _open_on_a_full_disk(cache: Path, path: Path, outcome: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # a write past it fails as one on a full disk does
    try:
        opened(data_config(cache, **jsonl(path)))
    except ConfigError as error:
        outcome.put(str(error))


def test_full_disk(tmp_path: Path) -> None:
    path, context = write_jsonl(tmp_path / "a.jsonl", TEXTS * 20), multiprocessing.get_context("fork")
    outcome = context.SimpleQueue()
    process = context.Process(target=_open_on_a_full_disk, args=(tmp_path / "cache", path, outcome))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    message = outcome.get()
    assert "cannot write: File too large; free space there or choose another folder (data.cache_dir" in message
    assert entries(tmp_path / "cache") == set()
    assert texts_of(data_config(tmp_path / "cache", **jsonl(path))) == TEXTS * 20


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    config = data_config(tmp_path / "cache", **jsonl(write_jsonl(tmp_path / "a.jsonl", TEXTS)))
    with pytest.raises(ConfigError, match=r"\[data\] cache_dir: the cache cannot be written"):
        opened(config)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert DataConfig().cache_folder() == Path("/somewhere/titanarch")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert DataConfig().cache_folder() == Path("/home/user/.cache/titanarch")
    assert DataConfig(cache_dir="~/tokens").cache_folder() == Path("/home/user/tokens")
