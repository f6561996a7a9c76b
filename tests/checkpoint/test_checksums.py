"""Checksums of what is written, markers of other versions, and the sharing out of what is read."""

import dataclasses
import hashlib
import json
from pathlib import Path

import fsspec
import pytest

from tests.checkpoint.common import assert_filled, checkpointer, digests, filled, one_process, save_steps
from tests.distributed import run_distributed
from titanarch.checkpoint.errors import CheckpointError
from titanarch.checkpoint.hashing import FileRecord, shares
from titanarch.checkpoint.marker import MARKER, Marker, NewerFormatError
from titanarch.checkpoint.store import load
from titanarch.config.errors import ConfigError

__all__ = ["one_process"]


def flipped(data: bytes) -> bytes:
    """Another bit near the end."""
    return data[:-100] + bytes([data[-100] ^ 64]) + data[-99:]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_damage_in_a_url_is_found(tmp_path: Path, scheme: str) -> None:
    location = f"{scheme}://{tmp_path}/run"
    saver = checkpointer(tmp_path, folder=location)
    for step in (1, 2):
        saver.save(step, filled(step), config_text="", force_sync=True)
    fs, root = fsspec.core.url_to_fs(f"{location}/step-00000002")
    data = fs.cat_file(f"{root}/__0_0.distcp")
    marker = json.loads(fs.cat_file(f"{root}/{MARKER}"))
    assert marker["files"]["__0_0.distcp"] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for name, damage, reason in (
        ("__0_0.distcp", flipped, "the file __0_0.distcp is damaged: its SHA-256 is not the committed one"),
        (".metadata", flipped, "the file .metadata is damaged: its SHA-256 is not the committed one"),
        ("__0_0.distcp", lambda content: content[:-5], f"the file __0_0.distcp has {len(data) - 5} bytes instead of {len(data)}"),
        (MARKER, flipped, f"{MARKER} is "),
    ):
        content = fs.cat_file(f"{root}/{name}")
        fs.pipe_file(f"{root}/{name}", damage(content))
        state = filled(0)
        loaded = saver.load(state)
        assert loaded is not None
        assert_filled(state, 1)
        assert len(loaded.skipped) == 1
        assert loaded.skipped[0].startswith(f"{location}/step-00000002: {reason}")
        fs.pipe_file(f"{root}/{name}", content)
    loaded = saver.load(filled(0))
    assert loaded is not None
    assert (loaded.step, loaded.skipped) == (2, ())
    saver.close()
    if scheme == "file":
        (tmp_path / "outside").write_bytes(data)
        (tmp_path / "run/step-00000002/__0_0.distcp").unlink()
        (tmp_path / "run/step-00000002/__0_0.distcp").symlink_to("../../outside")
        with pytest.raises(ConfigError, match=r"step 2 .*__0_0\.distcp is a symbolic link to outside the checkpoint"):
            load(location, filled(0), step=2)


@pytest.mark.usefixtures("one_process")
def test_sizes_alone_find_no_flipped_bit_in_the_data(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2])
    path = tmp_path / "checkpoints/step-00000002/__0_0.distcp"
    data = bytearray(path.read_bytes())
    place = data.index(filled(2)["model"]["w"].numpy().tobytes()[:64])
    data[place] ^= 1
    path.write_bytes(data)
    state = filled(0)
    loaded = load(tmp_path / "checkpoints", state, how="sizes")
    assert loaded is not None
    assert (loaded.step, int((state["model"]["w"] != 2).sum())) == (2, 1)
    loaded = load(tmp_path / "checkpoints", state)
    assert loaded is not None
    assert loaded.step == 1
    with pytest.raises(ConfigError, match=r"initial_load_path: .* is damaged: the file __0_0\.distcp is damaged"):
        checkpointer(tmp_path, initial_load_path=str(path.parent)).load_initial(filled(0))


@pytest.mark.usefixtures("one_process")
def test_the_first_format_is_read(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2])
    for step in (1, 2):
        path = tmp_path / f"checkpoints/step-0000000{step}" / MARKER
        table = json.loads(path.read_text())
        del table["sha256"], table["validation_loss"]
        sizes = {name: entry["bytes"] for name, entry in table["files"].items()}
        path.write_text(json.dumps({**table, "format_version": 1, "files": sizes}))
    state = filled(0)
    loaded = load(tmp_path / "checkpoints", state)
    assert loaded is not None
    assert loaded.step == 2
    assert_filled(state, 2)
    (path.parent / "__0_0.distcp").write_bytes(b"short")
    loaded = load(tmp_path / "checkpoints", state)
    assert loaded is not None
    assert loaded.skipped[0].endswith("step-00000002: the file __0_0.distcp has 5 bytes instead of " + str(sizes["__0_0.distcp"]))


@pytest.mark.usefixtures("one_process")
def test_a_newer_program_is_not_overruled(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2])
    path = tmp_path / "checkpoints/step-00000002" / MARKER
    newer = dataclasses.replace(Marker.from_bytes(path.read_bytes()), format_version=3)
    path.write_bytes(newer.to_bytes())
    with pytest.raises(CheckpointError, match=r"step-00000002: .*format_version 3.* up to 2: a newer program wrote it; use that one"):
        load(tmp_path / "checkpoints", filled(0))
    path.write_bytes(newer.to_bytes().replace(b'"step": 2', b'"step": 4'))  # damaged as well: then it is no newer program's
    loaded = load(tmp_path / "checkpoints", filled(0))
    assert loaded is not None
    assert (loaded.step, len(loaded.skipped)) == (1, 1)


def marker() -> Marker:
    files = {"a": FileRecord(5, "00"), "b": FileRecord(7, "11")}
    return Marker.make(3, sequence=2, world_size=4, config="x = 1\n", files=files, validation_loss=1.25)


def test_any_bit_flipped_in_a_marker_is_found_or_means_nothing() -> None:
    data = marker().to_bytes()
    assert Marker.from_bytes(data) == marker()
    found = 0
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 7)
        try:
            assert Marker.from_bytes(bytes(damaged)) == marker(), f"byte {place}: {data[max(0, place - 20) : place + 20]!r}"
        except NewerFormatError:
            pytest.fail(f"byte {place}: damage was taken for a newer program")
        except ValueError:
            found += 1
    assert found > 0.9 * sum(not chr(byte).isspace() for byte in data)


def test_a_loss_that_is_no_number_is_none() -> None:
    assert Marker.make(1, sequence=1, world_size=1, config="", files={}, validation_loss=float("nan")).validation_loss is None


def test_files_are_shared_out_by_size() -> None:
    files = {name: FileRecord(size, "") for name, size in {"a": 10, "b": 9, "c": 6, "d": 5, "e": 0}.items()}
    parts = shares(files, 2)
    assert sorted(name for part in parts for name in part) == sorted(files)
    assert [sum(files[name].bytes for name in part) for part in parts] == [15, 15]
    assert shares({}, 3) == [[], [], []]


def on_three(folder: Path) -> tuple[int, tuple[str, ...]]:
    """Save two checkpoints on three processes, of which the newer has a bit flipped in the file of the last."""
    saver = checkpointer(folder)
    for step in (1, 2):
        saver.save(step, filled(step), config_text="", force_sync=True)
    if saver.processes.rank == 0:
        newest = folder / "checkpoints/step-00000002"
        largest = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    saver.processes.gather(None)
    loaded = saver.load(filled(0))
    saver.close()
    assert loaded is not None
    return loaded.step, loaded.skipped


def test_processes_agree_on_what_one_of_them_reads(tmp_path: Path) -> None:
    outcomes = run_distributed(on_three, 3, tmp_path)
    assert outcomes == [outcomes[0]] * 3
    step, skipped = outcomes[0]
    assert step == 1
    assert len(skipped) == 1
    assert ".distcp is damaged: its SHA-256" in skipped[0]
    first = tmp_path / "checkpoints/step-00000001"
    assert json.loads((first / MARKER).read_text())["files"] == digests(first)
    assert len(list(first.glob("*.distcp"))) == 3
