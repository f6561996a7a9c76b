"""Documents as JSON objects, one a line."""

import json
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field
from pydantic_core import from_json

from titanarch.config.errors import did_you_mean, shown
from titanarch.config.registry import ComponentConfig
from titanarch.config.section import ListOf
from titanarch.data.errors import data_error
from titanarch.data.listing import find_files
from titanarch.data.retry import Reading
from titanarch.data.sources.base import SOURCES, Document, FilesConfig, Position, TextSource, half_of_pair


class JsonlConfig(FilesConfig):
    """JSON objects, one a line."""

    paths: ListOf[str] = Field(description="files .jsonl, .jsonl.gz or .jsonl.zst: fsspec URLs or globs", min_length=1)
    text_key: str = Field("text", description="key of the document's text")
    id_key: str = Field("", description="key of the document's name; empty: the file's name and the line")


class JsonLines(TextSource):
    """Lines of JSON objects; blank lines are no documents."""

    text_key: str
    id_key: str

    def read(self, start: Position) -> Iterator[tuple[Position, bytes]]:
        for number, stream in self._streams(start):
            offset, record = (start.offset, start.record) if number == start.file else (0, 0)
            stream.line = record + 1
            while line := stream.readline():
                if not line.isspace():
                    yield Position(number, offset, record), line
                offset += len(line)
                record += 1
                stream.line = record + 1

    def parse_object(self, position: Position, record: bytes) -> dict[str, Any]:
        """The JSON object of a line, whose text is checked to be a string."""
        url, line = self.files[position.file].url, position.record + 1
        try:
            item = _parsed(record, may_have_mark=position.offset == 0)
        except UnicodeDecodeError as error:
            raise data_error(f"is not UTF-8: {error.reason} at byte {error.start} of the line", file=url, line=line) from error
        except json.JSONDecodeError as error:
            raise data_error(f"is not JSON: {error.msg} at column {error.colno}", file=url, line=line) from error
        except (ValueError, RecursionError) as error:  # a number of too many digits, brackets too deep
            raise data_error(f"is JSON beyond what is read: {error}", file=url, line=line) from error
        if not isinstance(item, dict):
            raise data_error(f"is no JSON object but {shown(item)}", file=url, line=line)
        for key in filter(None, (self.text_key, self.id_key)):
            if key not in item:
                hint = did_you_mean(key, item) if item else ""
                raise data_error(f"the object has no key '{key}'{hint} (set data.source.text_key or id_key)", file=url, line=line)
        if not isinstance(item[self.text_key], str):
            raise data_error(f"'{self.text_key}' must be a string, not {shown(item[self.text_key])}", file=url, line=line)
        if problem := half_of_pair(item[self.text_key]):
            raise data_error(f"'{self.text_key}' {problem}", file=url, line=line)
        return item

    def text(self, position: Position, record: bytes) -> str:
        try:
            item = from_json(record)  # which refuses half of a surrogate pair itself
            text = item[self.text_key] if not self.id_key or self.id_key in item else None
        except (ValueError, TypeError, KeyError):
            text = None
        return text if type(text) is str else super().text(position, record)

    def parse(self, position: Position, record: bytes) -> Document:
        item = self.parse_object(position, record)
        name = str(item[self.id_key]) if self.id_key else f"{self.files[position.file].name}:{position.record + 1}"
        return Document(name, item[self.text_key])


def _parsed(line: bytes, *, may_have_mark: bool) -> Any:
    """The value of a line: by a parser that is four times as fast, and where that refuses, by the standard library's, which takes
    more (half of a surrogate pair, a byte-order mark) and says what is wrong."""
    try:
        return from_json(line)
    except ValueError:
        return json.loads(line.decode("utf-8-sig" if may_have_mark else "utf-8"))


@SOURCES.register("jsonl")
class JsonlSource(JsonLines):
    """JSON lines in files of the user's."""

    Config: ClassVar[type[ComponentConfig]] = JsonlConfig

    def __init__(self, config: JsonlConfig, reading: Reading = Reading()) -> None:  # noqa: B008 (immutable)
        super().__init__(config, find_files(config.paths, reading=reading), reading)
        self.text_key, self.id_key = config.text_key, config.id_key
