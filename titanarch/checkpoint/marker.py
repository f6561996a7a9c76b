"""The commit marker: a checkpoint counts only once ``COMMITTED.json`` is in its folder."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from datetime import datetime, timezone

MARKER = "COMMITTED.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Marker:
    """What process 0 writes last, after the upload of every process.

    ``sequence`` counts the commits of a folder: the highest is the newest, also where a run went back to an
    earlier step. ``files`` are the bytes of each file by name.
    """

    format_version: int
    step: int
    sequence: int
    world_size: int
    committed_at: str
    config_sha256: str
    config: str
    files: dict[str, int]

    @classmethod
    def make(cls, step: int, *, sequence: int, world_size: int, config: str, files: dict[str, int]) -> "Marker":
        """The marker of a checkpoint finished now."""
        return cls(
            format_version=FORMAT_VERSION,
            step=step,
            sequence=sequence,
            world_size=world_size,
            committed_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            config_sha256=hashlib.sha256(config.encode()).hexdigest(),
            config=config,
            files=files,
        )

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Marker":
        """ValueError says what is wrong with it."""
        try:
            table = json.loads(data)
        except ValueError as error:
            raise ValueError(f"{MARKER} is cut off or no JSON: {error}") from None
        if not isinstance(table, dict) or table.get("format_version") != FORMAT_VERSION:
            version = table.get("format_version") if isinstance(table, dict) else None
            raise ValueError(f"{MARKER} has format_version {version!r}; this program reads {FORMAT_VERSION}")
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        if set(table) != set(fields):
            raise ValueError(f"{MARKER} has the keys {sorted(table)} instead of {sorted(fields)}")
        wrong = [name for name, kind in fields.items() if type(table[name]) is not (dict if name == "files" else kind)]
        if wrong or not all(type(size) is int for size in table["files"].values()):
            raise ValueError(f"{MARKER} has values of a wrong type: {', '.join(wrong or ['files'])}")
        return cls(**table)

    def problem(self, sizes: dict[str, int]) -> str:
        """What differs between the files as committed and as found, ``sizes`` in bytes; empty when nothing does."""
        for name, size in self.files.items():
            if name not in sizes:
                return f"the file {name} is missing"
            if sizes[name] != size:
                return f"the file {name} has {sizes[name]} bytes instead of {size}"
        return ""
