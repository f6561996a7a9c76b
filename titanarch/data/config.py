"""The section [data]: what a run reads, and how."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from titanarch.config.registry import ComponentConfig
from titanarch.config.section import FREE, Section
from titanarch.data.packing import Packing
from titanarch.data.retry import Reading, RetryConfig
from titanarch.data.sources import SOURCES, CorpusConfig, MixtureConfig, Split, TokensConfig
from titanarch.data.tokenizers import TOKENIZERS, SentencePieceConfig

SourceField = Annotated[ComponentConfig, SOURCES]
TokenizerField = Annotated[ComponentConfig, TOKENIZERS]


class DataConfig(Section):
    """What a run reads, and how."""

    source: SourceField = Field(CorpusConfig(), description="where documents come from")
    tokenizer: TokenizerField = Field(SentencePieceConfig(), description="how text becomes tokens")
    mode: Literal["indexed", "streamed"] = Field(
        "indexed",
        description="indexed: tokenize once into a cache, shuffle rows; streamed: tokenize while training, in the source's order",
    )
    streams: int = Field(0, ge=0, description="streamed mode: logical streams, a multiple of the global batch; 0: as many as its rows")
    shuffle_documents: int = Field(
        0, ge=0, description="streamed mode: documents of a buffer that is filled, shuffled and given out; 0: the source's order"
    )
    packing: Packing = Field(
        "concat",
        description="concat: documents end to end, cut into rows; best_fit: whole documents that fill a row; padded: a document a row",
    )
    limit_documents: int = Field(0, ge=0, description="train on the first n documents alone; 0: on all")
    allow_repeat: bool = Field(
        False, description="let the run take more than 4 epochs of a source; else it is refused", json_schema_extra=FREE
    )
    validation: SourceField | None = Field(None, description="a source of its own for validation; unset: what the source holds out")
    validation_fraction: float = Field(0.0, ge=0, lt=1, description="share of the source's documents held out, by a hash of their names")
    cache_dir: str = Field(
        "", description="folder for tokenized sources; empty: titanarch in $XDG_CACHE_HOME or ~/.cache", json_schema_extra=FREE
    )
    workers: int = Field(0, ge=0, description="loader processes of each rank; 0: load in the training process", json_schema_extra=FREE)
    processes: int = Field(
        0, ge=0, description="processes that tokenize a source for the cache; 0: one a core where it has over 64 MB", json_schema_extra=FREE
    )

    retry: RetryConfig = Field(RetryConfig(), description="how reads of remote files are tried again", json_schema_extra=FREE)
    read_ahead_bytes: int = Field(
        16 << 20,
        ge=0,
        description="of a remote file's unpacked bytes kept ready by a thread of each reader; 0: none",
        json_schema_extra=FREE,
    )
    ledger: bool = Field(
        False, description="write which rows each step was fed into the run's folder, for `titanarch data ledger`", json_schema_extra=FREE
    )

    @model_validator(mode="after")
    def _one_way_to_validate(self) -> "DataConfig":
        if self.validation is not None and self.validation_fraction > 0:
            raise ValueError("give validation or validation_fraction, not both")
        if self.validation_fraction > 0 and SOURCES.of(self.source).splits_itself:
            raise ValueError(f"validation_fraction: the source '{self.source.kind}' says itself what is validation; leave it out")
        if self.validation_fraction > 0 and isinstance(self.source, TokensConfig):
            raise ValueError("validation_fraction: hold documents out when preparing the tokens (`titanarch data prepare`)")
        if self.mode == "streamed" and isinstance(self.source, TokensConfig):
            raise ValueError("mode: prepared tokens are read in indexed mode; 'streamed' is for text")
        if self.mode == "indexed" and self.streams:
            raise ValueError('streams has a meaning in streamed mode alone; leave it out or set mode = "streamed"')
        if self.mode == "indexed" and self.shuffle_documents:
            raise ValueError('shuffle_documents: indexed rows are shuffled already; leave it out or set mode = "streamed"')
        return self

    @model_validator(mode="after")
    def _mixture(self) -> "DataConfig":
        if isinstance(self.validation, MixtureConfig):
            raise ValueError("validation: one source, not a mixture, so that its loss has one meaning")
        if not isinstance(self.source, MixtureConfig):
            return self
        if self.mode == "streamed" and any(isinstance(part.source, TokensConfig) for part in self.source.sources):
            raise ValueError("mode: prepared tokens are read in indexed mode; all sources of a mixture are read in one mode")
        if self.mode == "streamed" and self.packing == "padded":
            reason = "shares of a mixture that is streamed are counted in rows, which padded ones do not fill"
            raise ValueError(f'packing: {reason}; set packing to "concat" or "best_fit", or mode = "indexed"')
        if self.validation_fraction > 0:
            raise ValueError("validation_fraction: a mixture holds nothing out; name a source of its own in data.validation")
        if self.limit_documents:
            raise ValueError("limit_documents: it does not say of which source of the mixture; leave it out")
        return self

    def reading(self) -> Reading:
        """How files are read."""
        return Reading(self.retry, self.read_ahead_bytes)

    def source_of(self, split: Split) -> ComponentConfig:
        """The source that ``split`` is read from."""
        return self.validation if split == "validation" and self.validation is not None else self.source

    def cache_folder(self) -> Path:
        """Where tokenized sources are kept."""
        if self.cache_dir:
            return Path(self.cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "titanarch"
