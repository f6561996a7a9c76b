"""A [data] section for a test."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.common import data_config
from titanarch.data.config import DataConfig


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., DataConfig]:
    """A [data] section whose cache lies in the test's folder and whose tokenizer is ``bytes`` unless it says otherwise."""
    return lambda **table: data_config(tmp_path / "cache", **table)
