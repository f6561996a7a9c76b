"""Documents of a dataset of the Hugging Face Hub, as the ``datasets`` library streams it."""

import gzip
import threading
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import Field

from titanarch.config.errors import did_you_mean, shown
from titanarch.config.registry import ComponentConfig
from titanarch.data.errors import DamagedFile, DataError, data_error
from titanarch.data.listing import DataFile
from titanarch.data.retry import Reading
from titanarch.data.sources.base import SOURCES, Document, FilesConfig, Position, TextSource


class HuggingFaceConfig(FilesConfig):
    """A dataset of the Hugging Face Hub, streamed: nothing is downloaded before it is read."""

    path: str = Field(description="the dataset, 'organisation/name', or a folder laid out like one", min_length=1)
    name: str = Field("", description="its configuration, such as a language; empty: its default")
    split: str = Field("train", description="its split, whatever the run uses it for", min_length=1)
    revision: str = Field("", description="branch, tag or commit; empty: main. A commit keeps the data what they are")
    text_key: str = Field("text", description="column of the document's text")
    id_key: str = Field("", description="column of the document's name; empty: the split, the shard and the row")


@SOURCES.register("huggingface")
class HuggingFaceSource(TextSource):
    """Its shards are the files, and a place in one is the number of the row, up to which a run that goes on reads the shard again.

    Raises DataError where the ``datasets`` package is missing, or there is no such dataset, configuration, split or column.
    """

    Config: ClassVar[type[ComponentConfig]] = HuggingFaceConfig
    config: HuggingFaceConfig

    def __init__(self, config: HuggingFaceConfig, reading: Reading = Reading()) -> None:  # noqa: B008 (immutable)
        rows, versions = reading.persist(
            lambda failures: _opened(config), url=f"datasets://{config.path}", offset=0, closing=threading.Event()
        )
        n, name = rows.num_shards, f"datasets://{config.path}/{config.split}"
        stamp = " ".join(versions)
        super().__init__(config, [DataFile(f"{name}-{i:05d}-of-{n:05d}", 0, stamp) for i in range(n)], reading)
        self._columns = [key for key in (config.text_key, config.id_key) if key]
        self._rows = rows if rows.column_names is None else self._with_columns(rows)

    def _with_columns(self, rows: Any) -> Any:
        """The columns wanted, of a dataset that tells which it has."""
        for key in self._columns:
            if key not in rows.column_names:
                raise self._no_column(key, rows.column_names)
        return rows.select_columns(self._columns)

    def _no_column(self, key: str, columns: list[str]) -> DataError:
        option = "data.source.text_key" if key == self.config.text_key else "data.source.id_key"
        return data_error(f"the dataset has no column '{key}'{did_you_mean(key, columns)}", file=self.config.path, key=option)

    def read(self, start: Position) -> Iterator[tuple[Position, Mapping[str, Any]]]:
        for shard in range(start.file, len(self.files)):
            first = start.record if shard == start.file else 0
            for record, row in enumerate(self._shard(shard, first), first):
                yield Position(shard, 0, record), row

    def _shard(self, shard: int, first: int) -> Iterator[Mapping[str, Any]]:
        """The rows of a shard from one on; where reading fails, it begins again at the row that is wanted.

        Taken in batches of one, since the library's plain iterator would share out the rows among the loader's processes.
        """
        url, rows, place = self.files[shard].url, self._rows.shard(num_shards=len(self.files), index=shard), first
        batches: Iterator[Mapping[str, list[Any]]] | None = None

        def attempt(failures: int) -> Mapping[str, list[Any]] | None:
            nonlocal batches
            try:
                batches = batches or rows.skip(place).iter(batch_size=1)
                return next(batches, None)
            except Exception as error:
                batches = None
                if not _is_damage(error):
                    raise
                message = f"row {place + 1} cannot be read, the shard is damaged: {type(error).__name__}: {error}"
                raise data_error(message, file=url, kind=DamagedFile) from error

        while (batch := self.reading.persist(attempt, url=url, offset=place, closing=threading.Event(), unit="row")) is not None:
            yield {key: values[0] for key, values in batch.items()}
            place += 1

    def parse(self, position: Position, record: Mapping[str, Any]) -> Document:
        url, line = self.files[position.file].url, position.record + 1
        for key in self._columns:
            if key not in record:
                raise self._no_column(key, list(record))
        text = record[self.config.text_key]
        if not isinstance(text, str):
            raise data_error(f"'{self.config.text_key}' must be a string, not {shown(text)}", file=url, line=line)
        name = f"{self.config.split}-{position.file:05d}:{line}"
        return Document(str(record[self.config.id_key]) if self.config.id_key else name, text)

    def content(self) -> list[Any]:
        return self.identity()  # the Hub's commit, which says what the documents are


def _is_damage(error: Exception) -> bool:
    """Whether the content is at fault, not the way to it. pyarrow tells of damage by an OSError that has no number."""
    at_fault = (ValueError, LookupError, TypeError, EOFError, zlib.error, gzip.BadGzipFile)
    return isinstance(error, at_fault) or (type(error) is OSError and error.errno is None)


def _opened(config: HuggingFaceConfig) -> tuple[Any, list[str]]:
    """The rows of the split, and the versions of the files that they lie in."""
    try:
        import datasets
    except ImportError as error:
        raise data_error(f"{error}; install the extra: pip install 'titanarch[datasets]'", key="data.source.kind") from error

    try:
        builder = datasets.load_dataset_builder(config.path, config.name or None, revision=config.revision or None)
        rows = builder.as_streaming_dataset(split=config.split)
    except (FileNotFoundError, ValueError) as error:  # no such dataset, or no such configuration or split of it
        raise data_error(f"cannot be opened: {error}", file=config.path, key="data.source.path") from error
    files = (builder.config.data_files or {}).get(config.split)
    return rows, [builder.hash] if files is None else sorted({" ".join(map(str, each)) for each in files.origin_metadata})
