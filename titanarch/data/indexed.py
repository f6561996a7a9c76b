"""Reading the indexed format, which index_writer.py writes: tokenized documents, memory-mapped."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from pydantic import ValidationError

from titanarch.data.checksums import pieces_sha256_of, sha256_of
from titanarch.data.errors import DataError, data_error
from titanarch.data.index_writer import FORMAT, READABLE, VERSION, Meta
from titanarch.data.tokenizers import Tokenizer

CHECKED_BYTES = 16 << 20
"""Files up to here are read whole when data are opened, about 10 ms each."""


class TokenizedDocument(NamedTuple):
    """A document: its name, its tokens without the one that ends it (int64 [n]), and the UTF-8 bytes of its text."""

    id: str
    tokens: np.ndarray
    n_bytes: int


class IndexedData(Sequence[TokenizedDocument]):
    """The documents of a prepared folder, as a sequence of documents and as one long run of tokens.

    ``fingerprint`` is a hash of the tokens and the documents' starts. Opening checks the version, the size of every
    file, its checksum (of files over 16 MiB that of 16 blocks of 4 KiB spread over them), and that ``tokenizer`` is the
    one the data were made with, and raises DataError where any is wrong; ``verify`` reads everything and compares the
    checksums. ``checked``: False where another process has opened the same data just before.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, checked: bool = True) -> None:
        self.folder = folder
        self._tokenizer = tokenizer
        self.meta = _read_meta(folder)
        _check_tokenizer(folder, self.meta, tokenizer)
        _check_sizes(folder, self.meta)
        if checked:
            _check_content(folder, self.meta)
        self.dtype = np.dtype(self.meta.dtype)
        names = sorted(name for name in self.meta.files if name.startswith("tokens-"))
        self._shards = [_map(folder / name, self.dtype) for name in names]
        self._shard_ends = list(accumulate(len(shard) for shard in self._shards))
        self._offsets = _map(folder / "offsets.bin", np.dtype("<i8"))
        self._bytes = _map(folder / "bytes.bin", np.dtype("<i8"))
        self._ids, self._id_offsets = folder / "ids.bin", _map(folder / "id_offsets.bin", np.dtype("<i8"))
        self._n_end_tokens = 0 if tokenizer.eos_id is None else 1
        n_there = (self._shard_ends or [0])[-1], len(self._offsets) - 1, len(self._bytes), len(self._id_offsets) - 1
        n_told = self.meta.tokens, self.meta.documents, self.meta.documents, self.meta.documents
        if n_there != n_told or int(self._offsets[-1]) != self.meta.tokens:
            raise data_error(
                "does not fit the files beside it: tokens or documents are missing; prepare the data again", file=folder / "meta.json"
            )
        self._limit(self.meta.documents)

    def _limit(self, n_documents: int) -> None:
        self.n_documents = n_documents
        self.n_tokens = int(self._offsets[n_documents])
        sums = [file.sha256 for name, file in sorted(self.meta.files.items()) if name.startswith(("tokens-", "offsets"))]
        self.fingerprint = hashlib.sha256(" ".join([*sums, str(n_documents)]).encode()).hexdigest()

    def first(self, n_documents: int) -> "IndexedData":
        """This data, cut in place to its first ``n_documents``."""
        self._limit(min(n_documents, self.n_documents))
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.folder, self._tokenizer, self.n_documents)  # a worker process maps the files itself

    @property
    def starts(self) -> np.ndarray:
        """Where each document begins, and at last where all end, in tokens: int64 [documents + 1]."""
        return self._offsets[: self.n_documents + 1]

    @property
    def document_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text, int64 [documents]."""
        return self._bytes[: self.n_documents]

    def read(self, start: int, n: int) -> np.ndarray:
        """Tokens ``start`` to ``start + n``, in the stored dtype [n]."""
        shard = bisect_right(self._shard_ends, start)
        begin = start - (self._shard_ends[shard - 1] if shard else 0)
        tokens = self._shards[shard][begin : begin + n]
        if len(tokens) == n or start + len(tokens) >= self.n_tokens:
            return tokens
        return np.concatenate([tokens, self.read(start + len(tokens), n - len(tokens))])

    def windows(self, start_B: np.ndarray, n: int) -> np.ndarray:
        """Tokens ``start`` to ``start + n`` of each start, in the stored dtype [B, n]; 0 past the last token."""
        if len(self._shards) == 1 and len(start_B) and int(start_B.max()) + n <= self.n_tokens:
            shard = self._shards[0]
            # Every window of the shard as one view: indexing it copies all rows at once.
            view = np.ndarray((len(shard) - n + 1, n), shard.dtype, buffer=shard, strides=(shard.itemsize, shard.itemsize))
            return view[start_B]
        windows = np.zeros((len(start_B), n), dtype=self.dtype)
        for row, start in enumerate(start_B.tolist()):
            tokens = self.read(start, min(n, self.n_tokens - start))
            windows[row, : len(tokens)] = tokens
        return windows

    def copy_spans(self, start_P: np.ndarray, size_P: np.ndarray, *, into: np.ndarray, place_P: np.ndarray) -> None:
        """Copy tokens ``start`` to ``start + size`` of each span to ``place`` and on of ``into``, of one dimension."""
        for start, size, place in zip(start_P.tolist(), size_P.tolist(), place_P.tolist(), strict=True):
            into[place : place + size] = self.read(start, size)

    def __len__(self) -> int:
        return self.n_documents

    @overload
    def __getitem__(self, number: int) -> TokenizedDocument: ...
    @overload
    def __getitem__(self, number: slice) -> list[TokenizedDocument]: ...
    def __getitem__(self, number: int | slice) -> TokenizedDocument | list[TokenizedDocument]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
        tokens = self.read(start, end - start)[: end - start - self._n_end_tokens] if end > start else np.empty(0)
        return TokenizedDocument(self.document_id(number), tokens.astype(np.int64), int(self._bytes[number]))

    def document_id(self, number: int) -> str:
        start, end = int(self._id_offsets[number]), int(self._id_offsets[number + 1])
        with self._ids.open("rb") as file:
            file.seek(start)
            return file.read(end - start).decode()

    def verify(self) -> None:
        """Read every file and compare its checksum; DataError names the first that differs."""
        for name, entry in self.meta.files.items():
            if sha256_of(self.folder / name) != entry.sha256:
                raise _differs(self.folder / name)


def _differs(path: Path) -> DataError:
    return data_error("the content differs from the checksum in meta.json: copy it again or prepare the data again", file=path)


def _reopened(folder: Path, tokenizer: Tokenizer, n_documents: int) -> IndexedData:
    return IndexedData(folder, tokenizer, checked=False).first(n_documents)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # nothing to map
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _read_meta(folder: Path) -> Meta:
    path = folder / "meta.json"
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
    except FileNotFoundError as error:
        raise data_error("is missing: no prepared tokens here, or not finished", file=path) from error
    except ValueError as error:
        raise data_error(f"is damaged: {error}", file=path) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT or not isinstance(values.get("version"), int):
        raise data_error("does not describe prepared tokens", file=path)
    if values["version"] not in READABLE:
        remedy = "update titanarch" if values["version"] > VERSION else "prepare the data again"
        raise data_error(f"is of format version {values['version']}, this titanarch reads {VERSION}: {remedy}", file=path)
    try:
        meta = Meta.model_validate_json(text)
    except ValidationError as error:
        raise data_error(f"is damaged: {error}", file=path) from error
    for name in meta.files:
        if name != Path(name).name:
            raise data_error(f"names a file that is not of this folder, '{name}': it is damaged, or of a stranger", file=path)
    return meta


def _check_tokenizer(folder: Path, meta: Meta, tokenizer: Tokenizer) -> None:
    made_with = meta.tokenizer
    if (made_with.fingerprint, made_with.eos_id) != (tokenizer.fingerprint, tokenizer.eos_id):
        raise data_error(
            f"the tokenizer does not match the prepared data: they were made with {made_with.kind} {made_with.fingerprint[:12]} "
            f"(end token {made_with.eos_id}), the run has {tokenizer.config.kind} {tokenizer.fingerprint[:12]} "
            f"(end token {tokenizer.eos_id}); set data.tokenizer to that one or prepare the data again",
            file=folder,
            key="data.tokenizer",
        )


def _check_sizes(folder: Path, meta: Meta) -> None:
    for name, entry in meta.files.items():
        path = folder / name
        if not path.is_file():
            raise data_error("is missing from the prepared data: copy it again or prepare the data again", file=path)
        if (n_bytes := path.stat().st_size) != entry.bytes:
            fault = "is truncated" if n_bytes < entry.bytes else "is too long"
            raise data_error(f"{fault}: {n_bytes} bytes, not {entry.bytes}; copy it again or prepare the data again", file=path)


def _check_content(folder: Path, meta: Meta) -> None:
    """Compare what is cheap to compare: small files whole, and blocks of large ones."""
    for name, entry in meta.files.items():
        path = folder / name
        found = (sha256_of(path), entry.sha256) if entry.bytes <= CHECKED_BYTES else (pieces_sha256_of(path), entry.probe)
        if found[1] and found[0] != found[1]:
            raise _differs(path)
