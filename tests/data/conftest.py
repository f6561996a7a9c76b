"""[data] sections for tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.common import data_config, write_jsonl
from titanarch.data.config import DataConfig


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., DataConfig]:
    """A [data] section whose cache lies in the test's folder and whose tokenizer is ``bytes`` unless it says otherwise."""
    return lambda **table: data_config(tmp_path / "cache", **table)


@pytest.fixture
def mixture_of(tmp_path: Path, config_of: Callable[..., DataConfig], request: pytest.FixtureRequest) -> Callable[..., DataConfig]:
    """A mixture of the sources named, each with its table but for the source: the documents that the test's file has as ``TEXTS``."""

    def make(parts: dict[str, dict[str, Any]], **table: Any) -> DataConfig:
        sources = []
        for name, part in parts.items():
            path = write_jsonl(tmp_path / f"{name}.jsonl", request.module.TEXTS[name])
            sources.append({"source": {"kind": "jsonl", "paths": [str(path)]}, "name": name, **part})
        return config_of(source={"kind": "mixture", "sources": sources}, **table)

    return make
