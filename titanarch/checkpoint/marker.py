"""The commit marker: a checkpoint counts only once ``COMMITTED.json`` is in its folder."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from titanarch.checkpoint.hashing import FileRecord

MARKER = "COMMITTED.json"
FORMAT_VERSION = 2
"""1: ``files`` held sizes alone, and there was no ``validation_loss`` and no ``sha256`` of the marker itself."""

_SELF = "sha256"
_TYPES: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "step": (int,),
    "sequence": (int,),
    "world_size": (int,),
    "committed_at": (str,),
    "config_sha256": (str,),
    "config": (str,),
    "validation_loss": (float, int, type(None)),
    "files": (dict,),
}


class NewerFormatError(ValueError):
    """The marker is sound, and a newer program wrote it."""


@dataclass(frozen=True)
class Marker:
    """What process 0 writes last, after the upload of every process.

    ``sequence`` counts the commits of a folder: the highest is the newest, also where a run went back to an
    earlier step. ``validation_loss``: measured at the step; None where none was. ``files``: each file as it was written.
    """

    format_version: int
    step: int
    sequence: int
    world_size: int
    committed_at: str
    config_sha256: str
    config: str
    validation_loss: float | None
    files: dict[str, FileRecord]

    @classmethod
    def make(
        cls,
        step: int,
        *,
        sequence: int,
        world_size: int,
        config: str,
        files: Mapping[str, FileRecord],
        validation_loss: float | None = None,
    ) -> "Marker":
        """The marker of a checkpoint finished now. A loss that is no finite number is none."""
        return cls(
            format_version=FORMAT_VERSION,
            step=step,
            sequence=sequence,
            world_size=world_size,
            committed_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            config_sha256=hashlib.sha256(config.encode()).hexdigest(),
            config=config,
            validation_loss=_finite(validation_loss),
            files=dict(sorted(files.items())),
        )

    def with_loss(self, validation_loss: float) -> "Marker":
        """The marker once the loss is known that was measured after the save, at its step."""
        return dataclasses.replace(self, validation_loss=_finite(validation_loss))

    def to_bytes(self) -> bytes:
        """JSON, with the SHA-256 of what it says."""
        table = dataclasses.asdict(self)
        return json.dumps({**table, _SELF: _digest(table)}, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Marker":
        """ValueError says what is wrong with it; a NewerFormatError that a newer program wrote it."""
        try:
            table = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{MARKER} is cut off or no JSON: {error}") from None
        if not isinstance(table, dict):
            raise ValueError(f"{MARKER} holds a {type(table).__name__} instead of an object")
        said = table.pop(_SELF, None)
        if said is not None and said != _digest(table):
            raise ValueError(f"{MARKER} is damaged: its sha256 is not that of what it says")
        version = table.get("format_version")
        if type(version) is int and version > FORMAT_VERSION:
            raise NewerFormatError(
                f"{MARKER} has format_version {version}, and this program reads up to {FORMAT_VERSION}: a newer program wrote it; "
                "use that one, or move the checkpoint away"
            )
        if version not in (1, FORMAT_VERSION):
            raise ValueError(f"{MARKER} has format_version {version!r}; this program reads 1 to {FORMAT_VERSION}")
        if version == FORMAT_VERSION and said is None:
            raise ValueError(f"{MARKER} is damaged: it has no {_SELF}")
        return cls._checked(table, version)

    @classmethod
    def _checked(cls, table: dict[str, Any], version: int) -> "Marker":
        """The marker of a table; ValueError where keys or types are wrong."""
        if version == 1:
            table = {"validation_loss": None, **table}
        if set(table) != set(_TYPES):
            raise ValueError(f"{MARKER} has the keys {sorted(table)} instead of {sorted(_TYPES)}")
        wrong = [name for name, kinds in _TYPES.items() if type(table[name]) not in kinds]
        files = table["files"] if type(table["files"]) is dict else {}
        records = {name: _record(entry, version) for name, entry in files.items()}
        found = {name: record for name, record in records.items() if record is not None}
        wrong += ["files"] if len(found) < len(files) else []
        if wrong:
            raise ValueError(f"{MARKER} has values of a wrong type: {', '.join(wrong)}")
        return cls(**{**table, "files": found})

    def problem(self, sizes: Mapping[str, int]) -> str:
        """What differs between the files as committed and as found, ``sizes`` in bytes; empty when nothing does."""
        for name, record in self.files.items():
            if name not in sizes:
                return f"the file {name} is missing"
            if sizes[name] != record.bytes:
                return f"the file {name} has {sizes[name]} bytes instead of {record.bytes}"
        return ""

    @property
    def n_bytes(self) -> int:
        """Of all files together."""
        return sum(record.bytes for record in self.files.values())

    @property
    def has_checksums(self) -> bool:
        return self.format_version > 1


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def _record(entry: object, version: int) -> FileRecord | None:
    """A file's entry in a marker; None where it is none."""
    if version == 1:
        return FileRecord(entry, "") if type(entry) is int else None
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
        return None
    size, digest = entry["bytes"], entry["sha256"]
    return FileRecord(size, digest) if type(size) is int and type(digest) is str else None


def _digest(table: Mapping[str, Any]) -> str:
    """Of what a table says, however it is spaced and ordered."""
    return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
