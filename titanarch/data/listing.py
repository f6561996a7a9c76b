"""Finding files behind fsspec URLs and globs."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from titanarch.data.errors import DataError, data_error
from titanarch.data.retry import Reading, http_status, is_final

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf", "http": "http", "https": "http"}
"""The extra of this package that brings a protocol."""

STAMPS = ("mtime", "LastModified", "last_modified", "updated", "ETag", "etag", "Last-Modified", "blob_id")
"""What file systems say of a file's version; a local file has the first alone."""


@dataclass(frozen=True)
class DataFile:
    """A file found: its URL, its size as stored in bytes, and a stamp that changes when it is replaced."""

    url: str
    n_bytes: int
    stamp: str

    @cached_property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]


def find_files(patterns: Iterable[str], *, key: str = "data.source.paths", reading: Reading = Reading()) -> list[DataFile]:  # noqa: B008
    """The files that fsspec URLs and globs name: patterns in their order, the matches of a glob sorted, none twice.

    Links are followed, as a shell's globs do. Raises DataError where a pattern names nothing, a folder, or a file without a size.
    """
    found: dict[str, DataFile] = {}
    for pattern in patterns:
        fs, path = filesystem(pattern, key)
        is_glob = any(character in path for character in ("*[" if is_web(pattern) else "*?["))
        infos = _infos(fs, path, pattern, is_glob=is_glob, key=key, reading=reading)
        if not is_glob and infos[0]["type"] == "directory":
            raise data_error(f"is a folder; name its files, such as '{pattern.rstrip('/')}/*'", file=pattern, key=key)
        files = [data_file(fs, info) for info in infos if info["type"] == "file"]
        if not files:
            raise data_error("no file matches", file=pattern, key=key)
        for file in files:
            if not _is_utf8(file.url):
                raise data_error("the file's name is not UTF-8: rename it", file=file.url, key=key)
        found.update({file.url: file for file in files if file.url not in found})
    return list(found.values())


def _infos(fs: Any, path: str, pattern: str, *, is_glob: bool, key: str, reading: Reading) -> list[dict[str, Any]]:
    """What the file system says of each match, tried again where it is remote."""

    def attempt(failures: int) -> list[dict[str, Any]]:
        file = pattern
        try:
            infos = []
            for match in sorted(fs.glob(path)) if is_glob else [path]:
                file = match if is_glob else pattern
                infos.append(fs.info(match))
            return infos
        except FileNotFoundError as error:
            if not is_final(error):
                raise
            raise data_error(why_missing(error), file=file, key=key) from error
        except OSError as error:
            if not is_local(pattern) and not is_final(error):
                raise
            raise data_error(f"cannot be read: {error}", file=file, key=key) from error

    try:
        return reading.persist(attempt, url=pattern, offset=0, closing=threading.Event())
    except DataError as error:
        if error.problems[0].key:
            raise
        raise data_error(error.problems[0].message, file=pattern, key=key) from error


def why_missing(error: FileNotFoundError) -> str:
    """fsspec calls a file missing also where a server refuses to show it."""
    if error.__cause__ is None or http_status(error.__cause__) in (None, 404, 410):
        return "the file does not exist"
    return f"the server does not give it, are credentials missing? {error.__cause__}"


def _is_utf8(name: str) -> bool:
    """Whether a name can be written down; Python keeps other bytes of names as halves of surrogate pairs."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def filesystem(url: str, key: str) -> tuple[Any, str]:
    """The file system of ``url`` and its path there. DataError names the extra that a protocol wants."""
    try:
        return url_to_fs(url)
    except ImportError as error:
        extra = EXTRAS.get(fsspec.utils.get_protocol(url))
        remedy = f"; install the extra: pip install 'titanarch[{extra}]'" if extra else ""
        raise data_error(f"{error}{remedy}", file=url, key=key) from error
    except ValueError as error:  # an unknown protocol
        raise data_error(str(error), file=url, key=key) from error


def data_file(fs: Any, info: dict[str, Any]) -> DataFile:
    """A file as ``fs.info`` describes it."""
    stamps = [str(info[name]) for name in STAMPS if info.get(name) is not None]
    if not stamps and "created" in info:
        stamps = [str(info["created"])]
    local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
    url = info["name"] if local else fs.unstrip_protocol(info["name"])
    if info["size"] is None:
        raise data_error("the server does not tell the file's size, without which a broken read cannot go on; copy the file", file=url)
    return DataFile(url=url, n_bytes=info["size"], stamp=" ".join(stamps))


def is_local(url: str) -> bool:
    """Whether ``url`` is a path of this machine."""
    return fsspec.utils.get_protocol(url) in ("file", "local")


def is_web(url: str) -> bool:
    """Whether ``url`` is of HTTP, where a question mark begins the query."""
    return fsspec.utils.get_protocol(url) in ("http", "https")
