"""A preparation that is broken off goes on to the same bytes; the card beside prepared data, and what it finds."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.common import make_texts
from titanarch.cli.main import main
from titanarch.config.errors import ConfigError
from titanarch.data import indexed, unfinished
from titanarch.data import prepare as preparing
from titanarch.data.index_writer import IndexWriter
from titanarch.data.indexed import IndexedData
from titanarch.data.split import held_out
from titanarch.data.tokenizers import BytesConfig, BytesTokenizer

TEXTS = [*make_texts(300, seed=5), "", *make_texts(5, seed=6)]
ROOT = Path(__file__).parents[2]
IN_A_PROCESS = """
import sys, time
from titanarch.data import index_writer, prepare
prepare.CHUNK_CHARACTERS, prepare.COMMIT_TOKENS = 300, 2000
index_writer.IndexWriter.__init__.__kwdefaults__["shard_bytes"] = 9000
write = index_writer.IndexWriter.add
index_writer.IndexWriter.add = lambda self, *args: (write(self, *args), time.sleep(0.004))
from titanarch.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[str]]:
    """Small shards, chunks and commits, and what prepares the texts into a folder."""
    monkeypatch.setattr(preparing, "CHUNK_CHARACTERS", 300)
    monkeypatch.setattr(preparing, "COMMIT_TOKENS", 6000)
    monkeypatch.setattr(IndexWriter.__init__, "__kwdefaults__", {"shard_bytes": 9000, "written": None})
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": f"name {i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    source = f'{{kind = "jsonl", paths = ["{path}"], id_key = "id"}}'
    return lambda out: [
        *("data", "prepare", "--data.source", source, "--data.tokenizer", "bytes", "--data.validation_fraction", "0.2", "--out", str(out))
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def break_off(monkeypatch: pytest.MonkeyPatch, arguments: list[str], after: int) -> None:
    """Prepare until ``after`` documents have been written since the command began."""
    left = [after]
    write = IndexWriter.add

    def add(self: IndexWriter, *args: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        write(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(IndexWriter, "add", add)
        with pytest.raises(Killed):
            main(arguments)


def test_broken_off_anywhere_it_goes_on_to_the_same_bytes(
    tmp_path: Path, arguments: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "whole")) == 0
    whole = files(tmp_path / "whole")
    assert len([name for name in whole if "train/tokens" in name]) > 2
    capsys.readouterr()
    for after in (100, 225, 290):
        out = tmp_path / f"out{after}"
        break_off(monkeypatch, arguments(out), after)
        assert not out.exists()
        if after < 230:
            (out.with_name(f"{out.name}.partial") / "train" / "tokens-00099.bin").write_bytes(b"of a later commit that never was")
        break_off(monkeypatch, arguments(out), 3)
        assert main(arguments(out)) == 0
        assert ("tokenizing train: goes on after" in capsys.readouterr().err) == (after < 230)  # documents of the training split
        assert files(out) == whole
        assert not out.with_name(f"{out.name}.partial").exists()


def test_a_killed_command_with_processes_goes_on_to_the_same_bytes(tmp_path: Path, arguments: Callable[[Path], list[str]]) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", IN_A_PROCESS, *arguments(out), "--processes", "2"]
    progress = out.with_name("out.partial") / "train" / "progress.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not progress.exists():
        time.sleep(0.005)
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not out.exists()
    assert main(arguments(out)) == 0
    assert main(arguments(tmp_path / "whole")) == 0
    assert files(out) == files(tmp_path / "whole")


def test_damaged_unfinished_work_is_noticed(
    tmp_path: Path, arguments: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    break_off(monkeypatch, arguments(out), 200)
    kept = tmp_path / "kept"
    shutil.copytree(partial, kept)

    def refused() -> str:
        assert main(arguments(out)) == 2
        said = capsys.readouterr().err
        shutil.rmtree(partial)
        shutil.copytree(kept, partial)
        return said

    shard = partial / "train" / "tokens-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert f"{shard}: is truncated: {len(content) // 2} bytes, not the " in refused()
    shard.write_bytes(b"\0" + content[1:])
    assert f"{shard}: differs from what was finished: it is damaged" in refused()
    (partial / "train" / "offsets.bin").unlink()
    assert "offsets.bin: is truncated: nothing, not the " in refused()
    (partial / "train" / "progress.json").write_text('{"written"')
    assert "progress.json: is damaged; remove" in refused()
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text() + json.dumps({"id": "new", "text": "more"}) + "\n")
    assert f"{partial}: is an unfinished preparation of other data" in refused()


def test_two_commands_do_not_meet(tmp_path: Path) -> None:
    with unfinished.resumable(tmp_path / "out", ["a"]) as folder:
        (folder / "split").mkdir()
        with pytest.raises(ConfigError, match="another process is preparing this folder"), unfinished.resumable(tmp_path / "out", ["a"]):
            pass
    with pytest.raises(ConfigError, match="exists already"), unfinished.resumable(tmp_path / "out", ["a"]):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_card_says_what_the_data_are(tmp_path: Path, arguments: Callable[[Path], list[str]]) -> None:
    out = tmp_path / "out"
    assert main(arguments(out)) == 0
    chosen = [held_out(f"name {i}", 0.2) for i in range(len(TEXTS))]
    meta = {split: json.loads((out / split / "meta.json").read_text()) for split in ("train", "validation")}
    assert (meta["train"]["documents"], meta["train"]["of_other_splits"]) == (len(TEXTS) - sum(chosen), sum(chosen))
    assert (meta["validation"]["documents"], meta["validation"]["of_other_splits"]) == (sum(chosen), len(TEXTS) - sum(chosen))
    assert meta["train"]["empty"] + meta["validation"]["empty"] == 1
    path = tmp_path / "a.jsonl"
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    assert meta["train"]["inputs"] == [{"url": str(path), "bytes": path.stat().st_size, "sha256": checksum}]
    card = (out / "README.md").read_text()
    assert f"| train | {path} | {path.stat().st_size:,} | {checksum} |" in card
    for split in ("train", "validation"):
        for name, entry in meta[split]["files"].items():
            assert entry["sha256"] == hashlib.sha256((out / split / name).read_bytes()).hexdigest()
            assert f"{name} | {entry['bytes']:,} | {entry['sha256']} |" in card


@pytest.mark.parametrize("small", [True, False])
def test_a_replaced_shard_of_the_same_size_is_refused_when_opened(
    small: bool, tmp_path: Path, arguments: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small files are read whole, of large ones blocks."""
    monkeypatch.setattr(indexed, "CHECKED_BYTES", (16 << 20) if small else 0)
    assert main(arguments(tmp_path / "out")) == 0
    folder, tokenizer = tmp_path / "out" / "train", BytesTokenizer(BytesConfig())
    shard = folder / "tokens-00001.bin"
    IndexedData(folder, tokenizer)
    shard.write_bytes(bytes(reversed(shard.read_bytes())))
    with pytest.raises(ConfigError, match=r"tokens-00001.bin: the content differs from the checksum in meta.json"):
        IndexedData(folder, tokenizer)


def test_data_of_format_1_are_read(tmp_path: Path, arguments: Callable[[Path], list[str]]) -> None:
    assert main(arguments(tmp_path / "out")) == 0
    path = tmp_path / "out" / "train" / "meta.json"
    meta = json.loads(path.read_text())
    for name in ("titanarch", "empty", "of_other_splits", "inputs"):
        del meta[name]
    for entry in meta["files"].values():
        del entry["probe"]
    path.write_text(json.dumps({**meta, "version": 1}))
    assert IndexedData(path.parent, BytesTokenizer(BytesConfig())).n_documents == meta["documents"]
