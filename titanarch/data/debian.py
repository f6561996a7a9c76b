"""Reading the files of a Debian package without unpacking it: an ar archive that holds a packed tar archive."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from titanarch.data.errors import data_error

_MAGIC, _HEADER_BYTES = b"!<arch>\n", 60


def files_of(path: Path) -> dict[str, bytes]:
    """The regular files of a package by their paths, such as ``usr/share/doc/perl/README``. Raises DataError where it is none."""
    for name, content in _members(path):
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                contents = ((member.name.removeprefix("./"), archive.extractfile(member)) for member in archive if member.isfile())
                return {name: file.read() for name, file in contents if file is not None}
    raise data_error("is no Debian package: it has no data.tar", file=path)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    content = path.read_bytes()
    if not content.startswith(_MAGIC):
        raise data_error("is no Debian package", file=path)
    place = len(_MAGIC)
    while place + _HEADER_BYTES <= len(content):
        header = content[place : place + _HEADER_BYTES]
        n_bytes = int(header[48:58])
        place += _HEADER_BYTES
        yield header[:16].decode().strip().rstrip("/"), content[place : place + n_bytes]
        place += n_bytes + n_bytes % 2
