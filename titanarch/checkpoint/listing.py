"""What lies in a folder of checkpoints, sound or not."""

from dataclasses import dataclass
from typing import Literal

from titanarch.checkpoint.config import Verification
from titanarch.checkpoint.marker import MARKER, Marker, NewerFormatError
from titanarch.checkpoint.processes import Processes
from titanarch.checkpoint.storage import Storage
from titanarch.checkpoint.verifying import verify

Condition = Literal["sound", "damaged", "not committed", "of a newer program"]


@dataclass(frozen=True)
class Listed:
    """A checkpoint's folder. ``marker``: None where it cannot be read. ``reason``: why it is not sound, else ""."""

    folder: str
    marker: Marker | None
    condition: Condition
    reason: str = ""


def look_at(storage: Storage, folder: str, *, how: Verification, processes: Processes) -> Listed:
    """The condition of one checkpoint. Collective, as ``verify`` is; used by one process alone."""
    try:
        if not storage.is_committed(folder):
            return Listed(folder, None, "not committed", f"it has no {MARKER}")
        marker = storage.marker(folder)
    except NewerFormatError as error:
        return Listed(folder, None, "of a newer program", str(error))
    except (ValueError, OSError) as error:
        return Listed(folder, None, "damaged", str(error))
    problem = verify(storage, folder, marker, how=how, processes=processes)
    return Listed(folder, marker, "damaged" if problem else "sound", problem)
