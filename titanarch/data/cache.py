"""Opening the tokens of a split: prepared ones as they are, text tokenized once into a cache."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from titanarch.data.config import DataConfig
from titanarch.data.errors import DataError, data_error
from titanarch.data.index_writer import VERSION, staged
from titanarch.data.indexed import IndexedData
from titanarch.data.prepare import prepare
from titanarch.data.skips import count
from titanarch.data.sources import MixtureConfig, Split, TokensConfig, TokensSource
from titanarch.data.split import SplitSource, has_validation, no_validation, open_source, opened_mixture
from titanarch.data.tokenizers import Tokenizer

logger = logging.getLogger(__name__)


def open_tokens(config: DataConfig, split: Split, tokenizer: Tokenizer) -> IndexedData:
    """The tokens of ``split``.

    A text source is tokenized at the first call, by one process while the others of this machine wait, and found
    again as long as neither its files, the tokenizer nor the limit of documents have changed. Raises DataError.
    """
    assert not isinstance(config.source_of(split), MixtureConfig), "the sources of a mixture are opened one by one"
    if not isinstance(config.source_of(split), TokensConfig):
        return _told(_cached(SplitSource(config, split), tokenizer, config))
    source = open_source(config, split)
    assert isinstance(source, TokensSource), "a TokensConfig is this class's"
    if split == "validation" and not has_validation(config):
        raise no_validation(config)
    folder = source.folder(split)
    if folder is None:
        raise data_error(f"the prepared data have no {split} split", file=source.path, key="data.source.path")
    data = _told(IndexedData(folder, tokenizer))
    if data.n_documents == 0:
        raise data_error("the prepared data have no documents", file=folder, key="data.source.path")
    return data.first(config.limit_documents) if split == "train" and config.limit_documents else data


def _told(data: IndexedData) -> IndexedData:
    """``data``, with a word on what was skipped when they were made."""
    if data.meta.skipped:
        n_documents, n_files = count(data.meta.skipped)
        lost = f"{n_documents} malformed documents and the rest of {n_files} files"
        logger.warning("the tokens in %s lack %s, which meta.json names; to read them again, remove the folder", data.folder, lost)
    return data


def open_mixture(config: DataConfig, tokenizer: Tokenizer) -> list[IndexedData]:
    """The training tokens of each source of a mixture; a DataError names the source by its place."""
    return opened_mixture(config, lambda alone: open_tokens(alone, "train", tokenizer))


def _cached(source: SplitSource, tokenizer: Tokenizer, config: DataConfig) -> IndexedData:
    key = json.dumps([VERSION, source.identity(), tokenizer.fingerprint, tokenizer.eos_id])
    folder = config.cache_folder() / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if folder.exists():
        try:
            return IndexedData(folder, tokenizer)
        except DataError as error:
            logger.warning("the cached tokens are unusable and are made again: %s", error)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquired(folder.with_suffix(".lock"))
    except OSError as error:
        raise data_error(f"the cache cannot be written: {error.strerror or error}", file=folder.parent, key="data.cache_dir") from error
    with lock:
        _build(source, tokenizer, folder, config.processes)
    return IndexedData(folder, tokenizer)


def _acquired(path: Path) -> AcquireReturnProxy:
    """The lock, once it is ours; leaving its block frees it, and the system does when its holder dies."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        logger.warning("waiting for another process that tokenizes the same data (%s)", path)
        return lock.acquire()


def _build(source: SplitSource, tokenizer: Tokenizer, folder: Path, processes: int) -> None:
    if folder.exists():  # another process may have built it while this one waited
        try:
            IndexedData(folder, tokenizer)
            return
        except DataError:
            shutil.rmtree(folder)
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    with staged(folder) as staging:
        prepare(source, tokenizer, staging, processes=processes)
