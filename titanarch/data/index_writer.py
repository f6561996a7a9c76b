"""Writing tokenized documents to the indexed format, which indexed.py reads.

A folder: ``meta.json``; ``tokens-00000.bin`` and on, the documents one after the other, each followed by the
end-of-document token if the tokenizer has one, little-endian uint16 where the vocabulary fits and else uint32, a new
file at the first document past 512 MiB; ``offsets.bin`` int64 [documents + 1], where each document begins in tokens;
``bytes.bin`` int64 [documents], UTF-8 bytes of each; ``ids.bin`` and ``id_offsets.bin``, their names likewise.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from titanarch.data.errors import data_error
from titanarch.data.skips import Skip
from titanarch.data.tokenizers import Tokenizer

FORMAT = "titanarch tokens"
VERSION = 1
SHARD_BYTES = 512 << 20


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class FileMeta(_Schema):
    """Size and checksum of a file."""

    bytes: int
    sha256: str


class TokenizerMeta(_Schema):
    """The tokenizer that the data were made with."""

    kind: str
    fingerprint: str
    vocab_size: int
    eos_id: int | None


class Meta(_Schema):
    """The content of meta.json. ``source``: what was tokenized, for people to read. ``skipped``: what of it could not be."""

    format: str
    version: int
    tokenizer: TokenizerMeta
    dtype: str
    documents: int
    tokens: int
    bytes: int
    files: dict[str, FileMeta]
    source: Any
    skipped: list[Skip] = []


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A fresh folder beside ``folder`` that takes its name when the block ends well, and vanishes when it does not.

    What cannot be written, to a full disk for one, is a DataError.
    """
    staging = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        staging.mkdir(parents=True)
        yield staging
        os.replace(staging, folder)
    except OSError as error:
        message = f"cannot write: {error.strerror or error}; free space there or choose another folder (data.cache_dir or --out)"
        raise data_error(message, file=folder) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class _File:
    """A file being written, with its size and checksum."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_bytes = 0
        self._hash = hashlib.sha256()
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115 - closed by the writer's exit stack

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.n_bytes += len(content)

    def finish(self) -> FileMeta:
        """To the disk for good; its entry in meta.json."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileMeta(bytes=self.n_bytes, sha256=self._hash.hexdigest())

    def close(self) -> None:
        self._file.close()


class IndexWriter:
    """Writes one set of documents into an existing empty ``folder``; nothing counts before ``finish``."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.n_documents = self.n_tokens = self.n_bytes = 0
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype=self._dtype).tobytes()
        self._shard_bytes = shard_bytes
        self._open = ExitStack()
        self._offsets, self._bytes, self._ids, self._id_offsets = map(
            self._create, ("offsets.bin", "bytes.bin", "ids.bin", "id_offsets.bin")
        )
        self._shards = [self._create("tokens-00000.bin")]
        for file in (self._offsets, self._id_offsets):
            file.write(_int64(0))

    def _create(self, name: str) -> _File:
        file = _File(self.folder / name)
        self._open.callback(file.close)
        return file

    def add(self, document_id: str, tokens: np.ndarray, n_bytes: int) -> None:
        """Append a document; ``tokens`` without the end-of-document token, ``n_bytes`` of its text in UTF-8."""
        if self._shards[-1].n_bytes >= self._shard_bytes:
            self._shards.append(self._create(f"tokens-{len(self._shards):05d}.bin"))
        self._shards[-1].write(tokens.astype(self._dtype).tobytes() + self._end)
        self._ids.write(document_id.encode())
        self.n_documents += 1
        self.n_tokens += len(tokens) + len(self._end) // self._dtype.itemsize
        self.n_bytes += n_bytes
        self._offsets.write(_int64(self.n_tokens))
        self._bytes.write(_int64(n_bytes))
        self._id_offsets.write(_int64(self._ids.n_bytes))

    def finish(self, source: Any, skipped: Sequence[Skip] = ()) -> None:
        """Write meta.json, which makes the folder readable; ``source`` (JSON) is kept for people, ``skipped`` says what is missing."""
        files = {file.path.name: file.finish() for file in (*self._shards, self._offsets, self._bytes, self._ids, self._id_offsets)}
        tokenizer = self._tokenizer
        meta = Meta(
            format=FORMAT,
            version=VERSION,
            tokenizer=TokenizerMeta(
                kind=tokenizer.config.kind,
                fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                eos_id=tokenizer.eos_id,
            ),
            dtype=self._dtype.str,
            documents=self.n_documents,
            tokens=self.n_tokens,
            bytes=self.n_bytes,
            files=files,
            source=source,
            skipped=list(skipped),
        )
        file = self._create("meta.json")
        file.write((meta.model_dump_json(indent=1) + "\n").encode())
        file.finish()

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()


def _int64(value: int) -> bytes:
    return value.to_bytes(8, "little")
