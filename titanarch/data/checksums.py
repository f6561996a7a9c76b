"""SHA-256 of files: of all of one, or of pieces spread over one, which are read in no time whatever its size."""

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

BLOCK_BYTES = 1 << 20
N_PIECES, PIECE_BYTES = 16, 4096


def sha256_of(path: Path) -> str:
    """Of a whole file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def pieces_sha256_of(path: Path) -> str:
    """Of the pieces of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        add_pieces(digest, file, path.stat().st_size)
    return digest.hexdigest()


def add_pieces(digest: Any, file: BinaryIO, n_bytes: int) -> None:
    """Add 16 pieces of 4 KiB to a hash, spread evenly over a file of ``n_bytes``, the first and the last among them."""
    last = max(0, n_bytes - PIECE_BYTES)
    for i in range(N_PIECES):
        file.seek(last * i // (N_PIECES - 1))
        digest.update(file.read(PIECE_BYTES))
