"""The ``[checkpoint]`` section."""

from typing import Literal

from pydantic import Field

from titanarch.config.section import ListOf, Section

Verification = Literal["checksums", "sizes"]
"""What of a checkpoint's files is compared with its marker before it is loaded."""


class CheckpointConfig(Section, identity=False):
    """When the state of a run is saved, where, and what a run starts from."""

    enable: bool = Field(True, description="save checkpoints, and resume from the newest one in the folder")
    folder: str = Field("checkpoints", description="folder of the checkpoints: inside the run's folder, an absolute path, or an fsspec URL")
    interval: int = Field(500, ge=1, description="steps between two checkpoints")
    keep_latest_k: int = Field(10, ge=0, description="committed checkpoints kept, a count; 0 keeps all")
    keep_every_n_steps: int = Field(0, ge=0, description="checkpoints of steps that this divides are never removed; 0: none")
    keep_best_k: int = Field(0, ge=0, description="checkpoints of the lowest validation loss kept beside the latest, a count; 0: none")
    async_mode: Literal["async", "process", "disabled"] = Field(
        "async", description="upload from a thread (async), from a process of its own (process), or before the next step (disabled)"
    )
    verify: Verification = Field(
        "checksums", description="compared before a checkpoint is loaded: the SHA-256 of every file, or its size alone, which reads less"
    )
    last_save: bool = Field(True, description="save at the end of training too")
    load_step: int = Field(-1, ge=-1, description="step to resume from; -1 is the checkpoint committed last")
    initial_load_path: str = Field(
        "", description="checkpoint to take weights from when there is none to resume: its folder, or a folder of several; empty is none"
    )
    initial_load_model_only: bool = Field(True, description="take only the model from initial_load_path, not optimizer, data state or step")
    exclude_from_loading: ListOf[str] = Field(
        (), description="names not taken from initial_load_path, as a prefix or a pattern: 'model.head', 'model.blocks.*.norm.*'"
    )
