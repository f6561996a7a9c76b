"""muP for every component: nothing that a model computes moves the more the wider it is. The models are rows of the parity matrix."""

from pathlib import Path
from typing import Any

import torch

from tests.distributed import run_distributed
from tests.parity.rows import D_MODEL, Row, rows
from titanarch.config.errors import ConfigError
from titanarch.contract.model import MODELS
from titanarch.train.coordinate_check import coordinate_check
from titanarch.train.processes import Processes
from titanarch.train.resolve import resolve
from titanarch.train.run_config import RunConfig

SEED, STEPS, WIDTHS, TOLERANCE = 7, 3, (D_MODEL, 8 * D_MODEL), 0.35
"""The narrow width makes exponents of -0.4 to 0.25 of what does not grow; a factor of the width left out adds 0.5 or 1."""

KINDS = ("absolute", "mixer ", "channel", "activation", "values", "tied head with", "everything", "H-Net", "EBT", "encoder-decoder")
"""How the rows begin that are trained: of the options of attention and of biases by distance, only all at once."""


def run_table(row: Row, cache: Path) -> dict[str, Any]:
    """A configuration under muP whose base is the row's own width."""
    base = MODELS.resolve(row.table).model_dump()
    return {
        "job": {"dump_folder": "nowhere"},
        "model": row.table,
        "data": {"tokenizer": {"kind": "bytes"}, "limit_documents": 4, "cache_dir": str(cache)},
        "training": {"seq_len": 32, "global_batch_size": 8, "steps": STEPS, "mixed_precision_param": "float32"},
        "optimizer": {
            "name": "AdamW",
            "lr": 2e-3,
            "weight_decay": 0.0,
            "parametrization": "mup",
            "mup_base": {key: value for key, value in base.items() if key != "name"},
            "lr_multipliers": {key.rpartition(".")[2]: value for key, value in row.keys.items()},  # rows have no other keys
        },
        "debug": {"seed": SEED},
    }


def exponents_of_all(cache: Path) -> dict[str, dict[str, float]]:
    """Of every activation of the rows, from its width to eight times that; in a process that has the package's components alone."""
    found, processes = {}, Processes(0, 1, torch.device("cpu"))
    for row in rows():
        if not row.name.startswith(KINDS):
            continue
        try:
            config = resolve(RunConfig.model_validate(run_table(row, cache)), seed=SEED, device_type="cpu")
            moved = coordinate_check(config, processes, widths=WIDTHS, steps=STEPS)
        except ConfigError as error:
            raise AssertionError(f"{row.name}: {error}") from error
        found[row.name] = {name: moved.exponent(name) for name in moved.by_name}
    return found


def test_nothing_moves_the_more_the_wider_the_model_is(tmp_path: Path) -> None:
    (found,) = run_distributed(exponents_of_all, 1, tmp_path, timeout_seconds=400)
    assert {"mixer rwkv7", "mixer mamba2", "channel moe", "channel swiglu of monarch layers", "H-Net", "EBT, S1", "EBT, S2"} <= found.keys()
    assert all("logits" in exponents for exponents in found.values())
    growing = {(row, part): e for row, exponents in found.items() for part, e in exponents.items() if not e <= TOLERANCE}
    assert growing == {}
