"""Writing tokenized documents to the indexed format, which indexed.py reads.

A folder: ``meta.json``, the card of the data; ``tokens-00000.bin`` and on, the documents one after the other, each followed by the
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

from titanarch import __version__
from titanarch.data.checksums import pieces_sha256_of
from titanarch.data.errors import data_error
from titanarch.data.skips import Skip
from titanarch.data.tokenizers import Tokenizer

FORMAT = "titanarch tokens"
VERSION = 2
READABLE = (1, VERSION)  # version 1 lacks what Meta has defaults for
SHARD_BYTES = 512 << 20


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class FileMeta(_Schema):
    """Size and checksum of a file. ``probe``: that of pieces spread over it; empty where none was taken."""

    bytes: int
    sha256: str
    probe: str = ""


class InputMeta(_Schema):
    """A file that documents were read from; its checksum where it lay on the machine that read it."""

    url: str
    bytes: int
    sha256: str | None


class Written(_Schema):
    """What an unfinished writer has put on the disk, in ``files``, the shards first and in order."""

    files: dict[str, FileMeta]
    documents: int
    tokens: int
    bytes: int
    empty: int


class TokenizerMeta(_Schema):
    """The tokenizer that the data were made with."""

    kind: str
    fingerprint: str
    vocab_size: int
    eos_id: int | None


class Meta(_Schema):
    """The content of meta.json: the card of the data.

    ``source``: what was tokenized and with what options, for people to read. ``empty``: documents without text. ``skipped``: what of
    the source could not be read. ``of_other_splits``: documents that were read and belong to another split. ``titanarch``: the
    version that wrote it.
    """

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
    titanarch: str = ""
    empty: int | None = None
    of_other_splits: int | None = None
    inputs: list[InputMeta] = []


def put_file(path: Path, text: str) -> None:
    """``path`` with the content ``text``, whole or not at all, and on the disk for good."""
    staging = path.with_name(f"{path.name}.new")
    with staging.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)


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
    """A file being written, with its size and checksum. ``kept``: what it begins with, of an earlier writer; the rest is cut off."""

    def __init__(self, path: Path, kept: FileMeta | None = None) -> None:
        self.path = path
        self.n_bytes = 0
        self._hash = hashlib.sha256()
        if kept is not None:
            self._take_over(kept)
        self._file: IO[bytes] = open(path, "ab" if kept else "wb")  # noqa: SIM115 - closed by the writer's exit stack

    def _take_over(self, kept: FileMeta) -> None:
        """Hash what is kept. Raises DataError where it is not what was written."""
        remedy = f"remove {self.path.parent.parent} and prepare the data anew"
        if not self.path.is_file() or (n_bytes := self.path.stat().st_size) < kept.bytes:
            there = f"{n_bytes} bytes" if self.path.is_file() else "nothing"
            raise data_error(f"is truncated: {there}, not the {kept.bytes} bytes that were finished; {remedy}", file=self.path)
        with self.path.open("r+b") as file:
            while self.n_bytes < kept.bytes:
                block = file.read(min(1 << 20, kept.bytes - self.n_bytes))
                self._hash.update(block)
                self.n_bytes += len(block)
            if self._hash.hexdigest() != kept.sha256:
                raise data_error(f"differs from what was finished: it is damaged; {remedy}", file=self.path)
            file.truncate(kept.bytes)

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.n_bytes += len(content)

    def commit(self) -> FileMeta:
        """To the disk for good, as far as it is written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileMeta(bytes=self.n_bytes, sha256=self._hash.hexdigest())

    def finish(self) -> FileMeta:
        """To the disk for good; its entry in meta.json."""
        entry = self.commit()
        self._file.close()
        return entry.model_copy(update={"probe": pieces_sha256_of(self.path)})

    def close(self) -> None:
        self._file.close()


class IndexWriter:
    """Writes one set of documents into an existing empty ``folder``; nothing counts before ``finish``.

    ``written``: go on after what an earlier writer committed. Raises DataError where that is truncated or damaged.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, shard_bytes: int = SHARD_BYTES, written: Written | None = None) -> None:
        self.folder = folder
        counts = (0, 0, 0, 0) if written is None else (written.documents, written.tokens, written.bytes, written.empty)
        self.n_documents, self.n_tokens, self.n_bytes, self.n_empty = counts
        self._kept = {} if written is None else written.files
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype=self._dtype).tobytes()
        self._shard_bytes = shard_bytes
        self._open = ExitStack()
        self._offsets, self._bytes, self._ids, self._id_offsets = map(
            self._create, ("offsets.bin", "bytes.bin", "ids.bin", "id_offsets.bin")
        )
        shards = [name for name in self._kept if name.startswith("tokens-")] or ["tokens-00000.bin"]
        self._shards = [self._create(name) for name in shards]
        if written is None:
            for file in (self._offsets, self._id_offsets):
                file.write(_int64(0))
        else:
            for path in set(folder.glob("tokens-*.bin")) - {shard.path for shard in self._shards}:  # begun, and never committed
                path.unlink()

    def _create(self, name: str) -> _File:
        file = _File(self.folder / name, self._kept.get(name))
        self._open.callback(file.close)
        return file

    def add(self, document_id: str, tokens: np.ndarray, n_bytes: int) -> None:
        """Append a document; ``tokens`` without the end-of-document token, ``n_bytes`` of its text in UTF-8."""
        if self._shards[-1].n_bytes >= self._shard_bytes:
            self._shards.append(self._create(f"tokens-{len(self._shards):05d}.bin"))
        self._shards[-1].write(tokens.astype(self._dtype).tobytes() + self._end)
        self._ids.write(document_id.encode(errors="backslashreplace"))
        self.n_documents += 1
        self.n_tokens += len(tokens) + len(self._end) // self._dtype.itemsize
        self.n_bytes += n_bytes
        self.n_empty += n_bytes == 0
        self._offsets.write(_int64(self.n_tokens))
        self._bytes.write(_int64(n_bytes))
        self._id_offsets.write(_int64(self._ids.n_bytes))

    @property
    def _files(self) -> tuple[_File, ...]:
        return (*self._shards, self._offsets, self._bytes, self._ids, self._id_offsets)

    def commit(self) -> Written:
        """Put all that is written on the disk, for a writer that goes on after it."""
        files = {file.path.name: file.commit() for file in self._files}
        return Written(files=files, documents=self.n_documents, tokens=self.n_tokens, bytes=self.n_bytes, empty=self.n_empty)

    def finish(self, source: Any, *, inputs: Sequence[InputMeta] = (), skipped: Sequence[Skip] = (), of_other_splits: int = 0) -> None:
        """Write meta.json, which makes the folder readable; ``source`` (JSON) is kept for people, for the rest see ``Meta``."""
        files = {file.path.name: file.finish() for file in self._files}
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
            titanarch=__version__,
            empty=self.n_empty,
            of_other_splits=of_other_splits,
            inputs=list(inputs),
        )
        put_file(self.folder / "meta.json", meta.model_dump_json(indent=1) + "\n")

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()


def _int64(value: int) -> bytes:
    return value.to_bytes(8, "little")
