"""The sink ``wandb``: Weights & Biases. The package is an extra."""

import importlib
import secrets
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from titanarch.config.registry import ComponentConfig
from titanarch.config.section import ListOf
from titanarch.train.metrics.files import atomic_write
from titanarch.train.metrics.rows import Row
from titanarch.train.metrics.sink import SINKS, Sink, SinkConfig, SinkContext

ID_FILE = "wandb_id"


class WandbConfig(SinkConfig):
    """Weights & Biases; the key is taken from where its own login command put it."""

    project: str = Field(description="project that the run belongs to", min_length=1)
    entity: str = Field("", description="user or team that owns the project; empty: the default of the login")
    group: str = Field("", description="group that the run is shown in; empty: none")
    tags: ListOf[str] = Field((), description="tags of the run")
    mode: Literal["online", "offline"] = Field("online", description="send while training, or keep for a later `wandb sync`")


@SINKS.register("wandb")
class WandbSink(Sink):
    """One W&B run a run folder: its id is kept in ``wandb_id``, so that a resumed run goes on in the same one.

    Rows carry their own step as the x-axis, because W&B refuses to go back to an earlier one. Steps that are run again
    after a resume therefore appear twice there; ``metrics.jsonl`` is the record.
    """

    Config: ClassVar[type[ComponentConfig]] = WandbConfig
    requires: ClassVar[Mapping[str, str]] = {"wandb": "pip install 'titanarch[wandb]'"}

    def __init__(self, config: WandbConfig) -> None:
        self._config = config
        self._run: Any = None

    def open(self, context: SinkContext) -> None:
        wandb = importlib.import_module("wandb")
        id_file = context.run_dir / ID_FILE
        if not id_file.exists():
            atomic_write(id_file, secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity or None,
            group=self._config.group or None,
            tags=list(self._config.tags),
            mode=self._config.mode,
            name=context.name,
            dir=str(context.run_dir),
            config=dict(context.config),
            id=id_file.read_text().strip(),
            resume="allow",
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Row, step: int) -> None:
        self._run.log({**row, "step": step})

    def close(self, result: Mapping[str, Any] | None) -> None:
        if self._run is None:
            return
        for key, value in (result or {}).items():
            if isinstance(value, (int, float, str)):
                self._run.summary[key] = value
        self._run.finish(exit_code=1 if result is None else 0)
