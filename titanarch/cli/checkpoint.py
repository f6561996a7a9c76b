"""``titanarch checkpoint``: list, verify, compare and average checkpoints."""

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from titanarch.checkpoint.averaging import average
from titanarch.checkpoint.choosing import split_path
from titanarch.checkpoint.comparing import compare
from titanarch.checkpoint.config import Verification
from titanarch.checkpoint.errors import CheckpointError
from titanarch.checkpoint.listing import Listed, look_at
from titanarch.checkpoint.opened import open_checkpoint
from titanarch.checkpoint.processes import Processes
from titanarch.checkpoint.storage import Storage, step_of
from titanarch.config.errors import ConfigError
from titanarch.config.load import load_config
from titanarch.train.run_config import RunConfig
from titanarch.train.setup import checkpoint_location

_PATH = "a run's folder, a folder or URL of checkpoints, or one checkpoint (step-00000100)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the actions."""
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    listing = actions.add_parser("ls", help="a table of checkpoints and their condition, as sizes tell", allow_abbrev=False)
    listing.add_argument("path", help=_PATH)
    verifying = actions.add_parser("verify", help="compare every file's checksum; status 1 where one is damaged", allow_abbrev=False)
    verifying.add_argument("path", help=f"{_PATH}; of several, all")
    comparing = actions.add_parser("diff", help="how two checkpoints differ; status 1 where they do", allow_abbrev=False)
    comparing.add_argument("first", help=f"{_PATH}; of several, the newest")
    comparing.add_argument("second", help="the same")
    averaging = actions.add_parser("average", help="the mean of models, as a checkpoint to start from", allow_abbrev=False)
    averaging.add_argument("paths", nargs="+", metavar="path", help=f"two or more: {_PATH}; of several, the newest")
    averaging.add_argument("--out", required=True, metavar="DIR", help="folder or URL for the one checkpoint; must not exist")


def run(args: argparse.Namespace) -> int:
    """Do the action; the exit status. ConfigError where there is no such checkpoint, or they do not fit together."""
    actions: dict[str, Callable[[argparse.Namespace], int]] = {"ls": _ls, "verify": _verify, "diff": _diff, "average": _average}
    try:
        return actions[args.action](args)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1


def _location(path: str) -> str:
    """Where the checkpoints of a run's folder lie; any other path as it is."""
    if "://" in path or not Path(path, "config.toml").is_file():
        return path
    return checkpoint_location(Path(path), load_config(Path(path, "config.toml"), (), RunConfig).config.checkpoint)


def _look(path: str, how: Verification) -> tuple[Storage, list[Listed]]:
    """All checkpoints at a path, or the one that it names. ConfigError where there is none."""
    location, name = split_path(_location(path))
    storage, processes = Storage(location), Processes(timedelta(hours=1))
    folders = [folder for folder in storage.folders() if name in ("", folder)]
    if not folders:
        raise ConfigError(f"{path} holds no checkpoint; give {_PATH}")
    return storage, [look_at(storage, folder, how=how, processes=processes) for folder in folders]


def _ls(args: argparse.Namespace) -> int:
    _, found = _look(args.path, "sizes")
    rows = [("checkpoint", "step", "processes", "bytes", "committed", "validation loss", "state")]
    for listed in found:
        marker, state = listed.marker, listed.condition + (f": {listed.reason}" if listed.reason else "")
        if marker is None:
            rows.append((listed.folder, f"{step_of(listed.folder):,}", "-", "-", "-", "-", state))
            continue
        loss = "-" if marker.validation_loss is None else f"{marker.validation_loss:.4f}"
        rows.append((listed.folder, f"{marker.step:,}", str(marker.world_size), f"{marker.n_bytes:,}", marker.committed_at, loss, state))
    _print_table(rows, right=(1, 2, 3, 5))
    return 0


def _verify(args: argparse.Namespace) -> int:
    storage, found = _look(args.path, "checksums")
    for listed in found:
        print(f"{storage.path(listed.folder)}: {_verdict(listed)}")
    asked_for_one = bool(split_path(args.path)[1])
    allowed = {"sound"} if asked_for_one else {"sound", "not committed"}  # what a kill leaves behind is never loaded
    return 0 if all(listed.condition in allowed for listed in found) else 1


def _verdict(listed: Listed) -> str:
    if listed.marker is None or listed.reason:
        return f"{listed.condition}: {listed.reason}"
    size = f"{len(listed.marker.files)} files, {listed.marker.n_bytes:,} bytes"
    return f"sound: {size}" if listed.marker.has_checksums else f"sound in size: {size}; it was written without checksums"


def _diff(args: argparse.Namespace) -> int:
    first, second = (open_checkpoint(_location(path)) for path in (args.first, args.second))
    comparison = compare(first, second)
    for line in comparison.other:
        print(line)
    if comparison.tensors:
        rows = [("tensor", "elements", "differing", "largest absolute", "largest relative")]
        for tensor in comparison.tensors:
            counts = f"{tensor.n_elements:,}", f"{tensor.n_differing:,}"
            rows.append((tensor.name, *counts, f"{tensor.absolute:.6g}", f"{tensor.relative:.6g}"))
        _print_table(rows, right=(1, 2, 3, 4))
    print(f"{comparison.n_identical} tensors are identical, {len(comparison.tensors)} differ")
    return 1 if comparison.differs else 0


def _average(args: argparse.Namespace) -> int:
    if len(args.paths) < 2:
        raise ConfigError("a mean wants two or more checkpoints")
    done = average([open_checkpoint(_location(path)) for path in args.paths], args.out)
    print(f"{done.path}: the mean of {len(args.paths)} models, {done.n_bytes:,} bytes")
    print(f'start from it with checkpoint.initial_load_path = "{args.out}"')
    return 0


def _print_table(rows: Sequence[Sequence[str]], *, right: Sequence[int]) -> None:
    """Columns as wide as what stands in them; those of ``right`` end alike."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())
