"""Full disks, folders that cannot be written, and checkpoints made to do harm."""

import dataclasses
import errno
import hashlib
import multiprocessing
import os
import pickle
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata

from tests.checkpoint.common import assert_filled, checkpointer, filled, names, one_process, save_steps
from titanarch.checkpoint import saving
from titanarch.checkpoint.errors import CheckpointError
from titanarch.checkpoint.hashing import FileRecord
from titanarch.checkpoint.marker import MARKER, Marker
from titanarch.checkpoint.store import load
from titanarch.checkpoint.torch_io import files_of, read_index
from titanarch.config.errors import ConfigError

__all__ = ["one_process"]
pytestmark = pytest.mark.usefixtures("one_process")


def recommit(folder: Path) -> None:
    """A marker that fits the files: damage that no checksum finds, as whoever means harm leaves it."""
    marker = Marker.from_bytes((folder / MARKER).read_bytes())
    content = {name: (folder / name).read_bytes() for name in marker.files}
    files = {name: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items()}
    (folder / MARKER).write_bytes(dataclasses.replace(marker, files=files).to_bytes())


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, *, after_bytes: int) -> Iterator[None]:
    """A file system that takes ``after_bytes`` more bytes of a file, and then none."""
    create = FileSystem.create_stream

    @contextmanager
    def create_stream(self: FileSystem, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with create(self, path, mode) as stream:
            if "w" in mode:
                write = stream.write

                class Full:
                    def __getattr__(self, name: str) -> Any:
                        return getattr(stream, name)

                    def write(self, data: Any) -> int:
                        if stream.tell() + len(memoryview(data).cast("B")) > after_bytes:
                            raise OSError(errno.ENOSPC, "No space left on device", str(path))
                        return write(data)

                yield Full()
            else:
                yield stream

    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", create_stream)
        yield


@pytest.mark.parametrize(("mode", "after_bytes"), [("async", 2000), ("disabled", 2000), ("async", 0)])
def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path, mode: str, after_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = checkpointer(tmp_path, async_mode=mode, keep_latest_k=1)
    saver.save(1, filled(1), config_text="", force_sync=True)
    with (
        full_disk(monkeypatch, after_bytes=after_bytes),
        pytest.raises(CheckpointError, match=r"step-00000002: the disk is full.*Free space"),
    ):
        saver.save(2, filled(2), config_text="")
        saver.wait()
    assert names(tmp_path) == ["step-00000001"]
    state = filled(0)
    saver.load(state)
    assert_filled(state, 1)
    saver.save(3, filled(3), config_text="")  # with room again, the same object goes on
    saver.close()
    assert names(tmp_path) == ["step-00000003"]


def test_a_failed_upload_is_raised_before_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = checkpointer(tmp_path)
    with full_disk(monkeypatch, after_bytes=0):
        saver.save(1, filled(1), config_text="")
        saver._thread.submit(lambda: None).result()  # the upload has ended
    with pytest.raises(CheckpointError, match="the disk is full"):
        saver.maybe_wait()
    saver.maybe_wait()  # said once
    saver.close()


def test_a_killed_upload_process_is_said_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next save says so; one that is waited for needs no such process."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr("torch.distributed.checkpoint._async_process_executor._CHECKPOINT_PROCESS", None)  # torch has one a program
    saver, before = checkpointer(tmp_path, async_mode="process"), multiprocessing.active_children()
    saver.save(1, filled(1), config_text="")
    saver.wait()
    (uploader,) = [child for child in multiprocessing.active_children() if child not in before]
    uploader.kill()
    uploader.join()
    saver.save(2, filled(2), config_text="")
    assert "step-00000002: the checkpoint was not written (process 0: " in saver.wait_for_all()
    assert saver.wait_for_all() == ""
    assert names(tmp_path) == ["step-00000001"]
    saver.save(3, filled(3), config_text="", force_sync=True)
    state = filled(0)
    assert saver.load(state) is not None
    assert_filled(state, 3)
    saver.close()


def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        saver = checkpointer(disk)
        saver.save(1, filled(1), config_text="")
        with pytest.raises(CheckpointError, match="step-00000002: the disk is full"):
            saver.save(2, filled(2, size=2_000_000), config_text="", force_sync=True)
        state = filled(0)
        assert saver.load(state) is not None
        assert_filled(state, 1)
        saver.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    saver = checkpointer(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"file/checkpoints/step-00000001: the checkpoint was not written .*NotADirectoryError"):
        saver.save(1, filled(1), config_text="", force_sync=True)
    saver.close()


def test_a_read_only_folder_is_said_before_the_first_step(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        saver = checkpointer(tmp_path, folder=str(disk / "checkpoints"))
        with pytest.raises(
            ConfigError, match=r"\[checkpoint\] folder: .*disk/checkpoints cannot be written .*Read-only.*nothing was trained"
        ):
            saver.claim()
        saver.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class NoCredentialsError(Exception):
    """As botocore raises it: no OSError."""


def test_missing_credentials_are_said_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    saver = checkpointer("unused", folder="memory://nobody/run")
    saver.claim()
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "pipe_file", refuse)
        with pytest.raises(
            ConfigError, match=r"memory://nobody/run cannot be written .*NoCredentialsError: Unable to locate.*give credentials"
        ):
            saver.claim()
    with monkeypatch.context() as patch:  # they may be withdrawn later
        patch.setattr(MemoryFileSystem, "ls", refuse)
        with pytest.raises(CheckpointError, match="NoCredentialsError: Unable to locate credentials"):
            saver.save(1, filled(1), config_text="", force_sync=True)
    saver.close()


def test_a_storage_whose_package_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nothing://bucket/run cannot be opened: .*install the extra of titanarch that reads it"):
        checkpointer("unused", folder="nothing://bucket/run")


def test_another_run_that_commits_in_the_same_place_is_found(tmp_path: Path) -> None:
    ours, theirs = (checkpointer(tmp_path, folder=str(tmp_path / "shared")) for _ in range(2))
    ours.claim()
    theirs.claim()
    theirs.save(1, filled(1), config_text="", force_sync=True)
    with pytest.raises(CheckpointError, match=r"shared/step-00000001 was committed by another run.*checkpoint\.folder of its own"):
        ours.save(2, filled(2), config_text="", force_sync=True)
    theirs.save(3, filled(3), config_text="", force_sync=True)
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == ["step-00000001", "step-00000003"]
    for saver in (ours, theirs):
        saver.close()


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.mkdir, ("executed",))


def test_a_malicious_index_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, [1])
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints/step-00000001"
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    recommit(folder)
    with pytest.raises(CheckpointError, match=r"refused: it names posix\.mkdir"):
        load(tmp_path / "checkpoints", filled(0))
    assert not Path("executed").exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert Path("executed").exists(), "the pickle was harmless: the test proves nothing"


def test_an_index_that_names_a_file_of_another_folder_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    folder = tmp_path / "checkpoints/step-00000001"
    index = pickle.loads((folder / ".metadata").read_bytes())
    for place in index.storage_data.values():
        place.relative_path = "../../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    (tmp_path / "secret").write_bytes((folder / "__0_0.distcp").read_bytes())
    recommit(folder)
    with pytest.raises(CheckpointError, match=r"its index names \.\./\.\./secret, which is no file of the checkpoint"):
        load(tmp_path / "checkpoints", filled(0))


def test_an_index_with_missing_or_wrong_parts_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    data = (tmp_path / "checkpoints/step-00000001/.metadata").read_bytes()
    assert files_of(read_index(data, "x")) == {"__0_0.distcp"}
    no_tables, no_path = Metadata.__new__(Metadata), pickle.loads(data)
    del next(iter(no_path.storage_data.values())).relative_path
    for damaged in (pickle.dumps(no_tables), pickle.dumps(no_path), pickle.dumps({}), data.replace(b"strided", b"stridee"), data[:-9]):
        with pytest.raises(CheckpointError, match="x: refused: "):
            read_index(damaged, "x")


def test_pickled_objects_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = saving.collect
    with monkeypatch.context() as patch:  # what a foreign program might have written
        patch.setattr("titanarch.checkpoint.store.collect", lambda state, processes: collect(state, processes) | {"model.w": Evil()})
        patch.setattr(saving.Staging, "copy", lambda self, tensors: tensors)
        save_steps(tmp_path, [1])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"'model\.w' is no tensor in the checkpoint"):
        load(tmp_path / "checkpoints", filled(0))
    assert not Path("executed").exists()
