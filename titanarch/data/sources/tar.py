"""Documents as members of tar archives, grouped as WebDataset does (https://github.com/webdataset/webdataset)."""

import json
import tarfile
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from titanarch.config.errors import did_you_mean, shown
from titanarch.config.registry import ComponentConfig
from titanarch.config.section import ListOf
from titanarch.data.errors import DamagedFile, DataError, data_error
from titanarch.data.files import BUFFER_BYTES, ByteStream
from titanarch.data.listing import find_files
from titanarch.data.retry import Reading
from titanarch.data.sources.base import SOURCES, Document, FilesConfig, Position, TextSource, half_of_pair

TAR_BUFFER_BYTES = 1 << 16

KINDS = {tarfile.SYMTYPE: "symbolic link", tarfile.LNKTYPE: "hard link", tarfile.FIFOTYPE: "pipe"}


class TarConfig(FilesConfig):
    """Members of tar archives."""

    paths: ListOf[str] = Field(description="files .tar, .tar.gz, .tgz or .tar.zst: fsspec URLs or globs", min_length=1)
    extension: str = Field(
        "txt",
        min_length=1,
        description="of the member with a sample's text: what follows its name's first dot; text, or JSON if it ends in json",
    )
    text_key: str = Field("text", description="key of the text where the member is a JSON object")


class Sample(NamedTuple):
    """The members that share a key, the path up to the first dot of its last part: the one with the text, or what is wrong."""

    key: str
    member: str
    content: bytes | None
    problem: str


class _StrictHeader(tarfile.TarInfo):
    """tarfile takes a damaged or missing header for the end of the archive; here only the block of zeros is the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_StrictHeader":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} in place of a header") from error


@SOURCES.register("tar")
class TarSource(TextSource):
    """Samples of tar archives. Members are read as streams and never extracted, so their paths mean nothing but their key.

    Folders are passed over. A link, pipe or device is an error of its sample, as is a sample without the wanted member.
    """

    Config: ClassVar[type[ComponentConfig]] = TarConfig

    def __init__(self, config: TarConfig, reading: Reading = Reading()) -> None:  # noqa: B008 (immutable)
        super().__init__(config, find_files(config.paths, reading=reading), reading)
        self._extension, self._text_key = config.extension.lower().lstrip("."), config.text_key

    def read(self, start: Position) -> Iterator[tuple[Position, Sample]]:
        for number, stream in self._streams(start):
            if self.files[number].n_bytes == 0:
                continue
            begin, record = (start.offset, start.record) if number == start.file else (0, 0)
            for offset, sample in self._samples(stream, begin):
                yield Position(number, offset, record), sample
                record += 1

    def _samples(self, stream: ByteStream, begin: int) -> Iterator[tuple[int, Sample]]:
        """Each sample with the offset of its first header; ``stream`` stands at ``begin``, where a sample begins."""
        archive = None
        key, offset, sample = "", begin, Sample("", "", None, "")
        try:
            archive = tarfile.open(  # type: ignore[call-overload]  # noqa: SIM115
                fileobj=stream, mode="r|", bufsize=TAR_BUFFER_BYTES, tarinfo=_StrictHeader, errors="backslashreplace"
            )
            while (member := archive.next()) is not None:
                archive.members.clear()  # it keeps all it has seen
                if member.isdir():
                    continue
                member_key, extension = _split_name(member.name)
                if member_key != key:
                    if key:
                        yield offset, sample
                    key, offset, sample = member_key, begin + member.offset, Sample(member_key, "", None, "")
                sample = self._with_member(sample, archive, member, extension)
            if key:
                yield offset, sample
            _check_end(archive)
        except tarfile.TarError as error:
            at = begin + (archive.offset if archive is not None else 0)
            message = f"cannot be read on by byte {at} of the archive, it is truncated, damaged or no tar: {error}"
            raise data_error(message, file=stream.file.url, kind=DamagedFile) from error
        finally:
            if archive is not None:
                archive.close()

    def _with_member(self, sample: Sample, archive: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> Sample:
        if not member.isreg():
            kind = KINDS.get(member.type, "device or of an unknown kind")
            return sample._replace(problem=f"the member '{member.name}' is a {kind}, which is not followed")
        if extension != self._extension:
            return sample
        if sample.content is not None:
            return sample._replace(problem=f"the sample '{sample.key}' has two members '.{self._extension}'")
        content = archive.extractfile(member)
        assert content is not None, "a regular file"
        return sample._replace(member=member.name, content=content.read())

    def parse(self, position: Position, record: Sample) -> Document:
        file = self.files[position.file]
        if record.problem:
            raise self._malformed(record.problem, position)
        if record.content is None:
            message = f"the sample '{record.key}' has no member '.{self._extension}' (set data.source.extension)"
            raise self._malformed(message, position)
        try:
            text = record.content.decode()
            value: Any = json.loads(text) if self._extension.endswith("json") else text
        except UnicodeDecodeError as error:
            raise self._malformed(
                f"the member '{record.member}' is not UTF-8: {error.reason} at its byte {error.start}", position
            ) from error
        except (ValueError, RecursionError) as error:  # beside what is no JSON, a number of too many digits or brackets too deep
            raise self._malformed(f"the member '{record.member}' is not JSON: {error}", position) from error
        if self._extension.endswith("json"):
            if not isinstance(value, dict):
                raise self._malformed(f"the member '{record.member}' is no JSON object but {shown(value)}", position)
            if self._text_key not in value:
                hint = did_you_mean(self._text_key, value) if value else ""
                raise self._malformed(f"the member '{record.member}' has no key '{self._text_key}'{hint}", position)
            value = value[self._text_key]
        if not isinstance(value, str):
            raise self._malformed(f"'{self._text_key}' of '{record.member}' must be a string, not {shown(value)}", position)
        if problem := half_of_pair(value):
            raise self._malformed(f"'{self._text_key}' of '{record.member}' {problem}", position)
        return Document(f"{file.name}:{record.key}", value)

    def _malformed(self, message: str, position: Position) -> DataError:
        return data_error(f"{message} (sample from byte {position.offset} of the archive)", file=self.files[position.file].url)


def _split_name(name: str) -> tuple[str, str]:
    """A member's key and extension: 'a/b.c.txt' is 'a/b' and 'c.txt'; a leading './' is dropped."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _check_end(archive: tarfile.TarFile) -> None:
    """Read what follows the end, so that a packed file is checked to its end; nothing but zeros may."""
    while block := archive.fileobj.read(BUFFER_BYTES):
        if block.strip(b"\0"):
            raise tarfile.ReadError("content follows the end of the archive; were archives joined end to end?")
