"""Documents tokenized already, by ``titanarch data prepare``."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from titanarch.config.registry import ComponentConfig
from titanarch.data.errors import data_error
from titanarch.data.listing import is_local
from titanarch.data.retry import Reading
from titanarch.data.sources.base import SOURCES, Source, SourceConfig, Split


class TokensConfig(SourceConfig):
    """A folder that ``titanarch data prepare`` wrote."""

    path: str = Field(description="the folder, on a local disk because it is memory-mapped")


@SOURCES.register("tokens")
class TokensSource(Source):
    """A prepared folder: one set of documents, or a folder for each split."""

    Config: ClassVar[type[ComponentConfig]] = TokensConfig

    def __init__(self, config: TokensConfig, reading: Reading = Reading()) -> None:  # noqa: B008 (immutable)
        super().__init__(config, reading)
        if not is_local(config.path):
            raise data_error("prepared tokens are memory-mapped: copy the folder to a local disk", file=config.path, key="data.source.path")
        self.path = Path(config.path.removeprefix("file://").removeprefix("local://"))

    def folder(self, split: Split) -> Path | None:
        """Where ``split`` lies; the folder itself where it holds one set; None where it holds other splits alone.

        Raises DataError where there is no prepared data at all.
        """
        for folder in (self.path / split, self.path):
            if (folder / "meta.json").is_file():
                return folder
        if any((self.path / other / "meta.json").is_file() for other in ("train", "validation")):
            return None
        reason = "holds no prepared tokens: no meta.json" if self.path.is_dir() else "does not exist"
        raise data_error(f"the folder {reason}; write it with `titanarch data prepare`", file=self.path, key="data.source.path")
