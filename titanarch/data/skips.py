"""What a source passed over because it could not be read."""

import logging
from collections.abc import Iterable
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from titanarch.data.errors import DataError

logger = logging.getLogger(__name__)


class Skip(BaseModel):
    """What was passed over in one file. Offsets are bytes of the unpacked file, records are counted from 0."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    file: str
    first_offset: int
    first_record: int
    documents: int
    rest: bool
    reason: str


class Skips:
    """What was passed over, file by file; each file is logged once, and a document read again is not counted again.

    ``documents`` of a Skip are the malformed ones; with ``rest`` the file was left at some place, and how many documents it had from
    there on is not known.
    """

    def __init__(self) -> None:
        self._by_file: dict[str, Skip] = {}
        self._last: dict[str, tuple[int, int]] = {}

    def add_document(self, file: str, place: tuple[int, int], error: DataError) -> None:
        """The document at ``place``, (offset, record), is malformed."""
        if self._last.get(file, (-1, -1)) < place:
            self._last[file] = place
            before = self._by_file.get(file) or self._first(file, place, error)
            self._by_file[file] = before.model_copy(update={"documents": before.documents + 1})

    def add_rest(self, file: str, place: tuple[int, int], error: DataError) -> None:
        """The file cannot be read on; ``place``, (offset, record), is that of the last document before, or (0, 0)."""
        before = self._by_file.get(file)
        if before is None or not before.rest:
            self._by_file[file] = (before or self._first(file, place, error)).model_copy(update={"rest": True, "reason": str(error)})

    def _first(self, file: str, place: tuple[int, int], error: DataError) -> Skip:
        logger.warning("on_error = 'skip' passes over data: %s", error)
        return Skip(file=file, first_offset=place[0], first_record=place[1], documents=0, rest=False, reason=str(error))

    def restore(self, files: Iterable[Skip]) -> None:
        """Go on from ``files``, read before."""
        self._by_file, self._last = {skip.file: skip for skip in files}, {}

    @property
    def counts(self) -> "SkipCounts":
        """The sums over ``files``; asked for with every row."""
        return count(self._by_file.values()) if self._by_file else NOTHING

    @property
    def files(self) -> list[Skip]:
        """What was passed over, in the order of the first in each file."""
        return list(self._by_file.values())


class SkipCounts(NamedTuple):
    """Malformed documents, and files whose rest was left."""

    documents: int = 0
    files: int = 0


NOTHING = SkipCounts()


def count(skips: Iterable[Skip]) -> SkipCounts:
    """The sums over ``skips``."""
    skips = list(skips)
    return SkipCounts(sum(skip.documents for skip in skips), sum(skip.rest for skip in skips))
