"""A small configuration to plan for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from titanarch.config.load import load_config
from titanarch.train.resolve import resolve
from titanarch.train.run_config import RunConfig

SMALL = """
[job]
dump_folder = "unused"
[model]
name = "decoder"
n_layers = 2
d_model = 64
n_heads = 4
channel = { kind = "swiglu", d_ff = 128 }
mixers = { attention = { n_kv_heads = 2 } }
position = { relative = "linear_cpb" }
[training]
seq_len = 128
global_batch_size = 8
steps = 3
mixed_precision_param = "float32"
[optimizer]
name = "AdamW"
lr = 1e-3
"""

Configure = Callable[[dict[str, Any]], RunConfig]


def small_config(folder: Path, changes: dict[str, Any]) -> RunConfig:
    """The small configuration with other values of ``section.key``, resolved for a CPU."""
    path = folder / "small.toml"
    path.write_text(SMALL)
    overrides = [f"--{key}={value}" for key, value in changes.items()]
    return resolve(load_config(path, overrides, RunConfig).config, seed=0, device_type="cpu")


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    return lambda changes: small_config(tmp_path, changes)
