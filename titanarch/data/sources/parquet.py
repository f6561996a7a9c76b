"""Documents as rows of parquet files."""

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field

from titanarch.config.errors import did_you_mean, shown
from titanarch.config.registry import ComponentConfig
from titanarch.config.section import ListOf
from titanarch.data.errors import DamagedFile, data_error
from titanarch.data.files import open_random_access
from titanarch.data.listing import find_files
from titanarch.data.retry import Reading
from titanarch.data.sources.base import SOURCES, Document, FilesConfig, Position, TextSource

ROWS_A_BATCH = 256  # bounds the memory to that many documents


class ParquetConfig(FilesConfig):
    """Rows of parquet files."""

    paths: ListOf[str] = Field(description="parquet files: fsspec URLs or globs", min_length=1)
    text_key: str = Field("text", description="column of the document's text")
    id_key: str = Field("", description="column of the document's name; empty: the file's name and the row")


@SOURCES.register("parquet")
class ParquetSource(TextSource):
    """Rows of parquet files, read by row group; the columns of no interest are not read."""

    Config: ClassVar[type[ComponentConfig]] = ParquetConfig

    def __init__(self, config: ParquetConfig, reading: Reading = Reading()) -> None:  # noqa: B008 (immutable)
        super().__init__(config, find_files(config.paths, reading=reading), reading)
        self._columns = [name for name in (config.text_key, config.id_key) if name]
        self._has_id = bool(config.id_key)

    def read(self, start: Position) -> Iterator[tuple[Position, tuple[Any, ...]]]:
        import pyarrow  # slow to import, and only parquet needs it
        import pyarrow.parquet

        self._finished_bytes = sum(file.n_bytes for file in self.files[: start.file])
        for number in range(start.file, len(self.files)):
            file = self.files[number]
            if file.n_bytes == 0:
                continue
            with open_random_access(file, self.reading) as raw:
                try:
                    yield from self._rows(pyarrow.parquet.ParquetFile(raw), number, start.record if number == start.file else 0)
                except (pyarrow.ArrowException, OSError) as error:
                    raise data_error(
                        f"cannot be read, it is truncated, damaged or no parquet: {error}", file=file.url, kind=DamagedFile
                    ) from error
            self._finished_bytes += file.n_bytes

    def _rows(self, table: Any, number: int, first: int) -> Iterator[tuple[Position, tuple[Any, ...]]]:
        for column in self._columns:
            if column not in table.schema_arrow.names:
                hint = did_you_mean(column, table.schema_arrow.names)
                raise data_error(f"the table has no column '{column}'{hint}", file=self.files[number].url, key="data.source.text_key")
        record = 0
        for group in range(table.metadata.num_row_groups):
            n_rows = table.metadata.row_group(group).num_rows
            if record + n_rows <= first:
                record += n_rows
                continue
            for batch in table.iter_batches(ROWS_A_BATCH, row_groups=[group], columns=self._columns):
                for row in zip(*(_values(batch.column(column)) for column in self._columns), strict=True):
                    if record >= first:
                        yield Position(number, 0, record), row
                    record += 1

    def parse(self, position: Position, record: tuple[Any, ...]) -> Document:
        file, text = self.files[position.file], record[0]
        for column, value in zip(self._columns, record, strict=True):
            if isinstance(value, UnicodeDecodeError):
                message = f"'{column}' is not UTF-8: {value.reason} at its byte {value.start}"
                raise data_error(message, file=file.url, line=position.record + 1)
        if not isinstance(text, str):
            raise data_error(f"'{self._columns[0]}' must be a string, not {shown(text)}", file=file.url, line=position.record + 1)
        return Document(str(record[-1]) if self._has_id else f"{file.name}:{position.record + 1}", text)


def _values(column: Any) -> list[Any]:
    """The values of a column; in place of a text that is not UTF-8 the error that says so, for ``parse`` to raise."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error
