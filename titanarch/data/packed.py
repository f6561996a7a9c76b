"""Unpacking streams of bytes block by block. The blocks depend on the stored bytes alone, so that damage shows at the same place always."""

import gzip
import zlib
from collections.abc import Iterator
from typing import Any

BLOCK_BYTES = 1 << 20  # the most that a block holds
PACKED_BYTES = 128 << 10  # read at a time to be unpacked

GZIP_SUFFIXES = (".gz", ".tgz")
ZSTANDARD_SUFFIXES = (".zst", ".zstd", ".tzst")


class Damaged(Exception):
    """The content is truncated or damaged; the message says how."""


def unpacked_blocks(raw: Any, url: str) -> Iterator[bytes]:
    """The content of ``raw``, a buffered binary file, unpacked by the suffix of ``url``. Raises Damaged."""
    if url.endswith(GZIP_SUFFIXES):
        return _gzip_blocks(raw)
    return _zstandard_blocks(raw) if url.endswith(ZSTANDARD_SUFFIXES) else _plain_blocks(raw)


def is_packed(url: str) -> bool:
    """Whether the suffix of ``url`` is that of a compressed file."""
    return url.endswith(GZIP_SUFFIXES + ZSTANDARD_SUFFIXES)


def _plain_blocks(raw: Any) -> Iterator[bytes]:
    while block := raw.read1(BLOCK_BYTES):
        yield block


def _gzip_blocks(raw: Any) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
        while True:
            try:
                block = unpacked.read1(BLOCK_BYTES)  # one step of unpacking: what came before damage is not lost
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise Damaged(str(error)) from error
            if not block:
                return
            yield block


def _zstandard_blocks(raw: Any) -> Iterator[bytes]:
    """The package's own reader ends a truncated file without a word."""
    import zstandard  # only where a .zst file is read

    new_frame = zstandard.ZstdDecompressor().decompressobj
    frame, in_frame = new_frame(), False
    while packed := raw.read(PACKED_BYTES):
        while packed:
            try:
                block = frame.decompress(packed)
            except zstandard.ZstdError as error:
                raise Damaged(str(error)) from error
            in_frame, packed = not frame.eof, b""
            if frame.eof:
                packed, frame = frame.unused_data, new_frame()
            if block:
                yield block
    if in_frame:
        raise Damaged("the file ends inside a zstandard frame")
