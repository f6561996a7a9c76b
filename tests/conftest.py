"""What holds for every test: settings that must stand before torch is imported, and the gpu marker."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # repeatable sums, and room for tests that start processes
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns in every forked worker otherwise
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)  # the tests are never part of somebody's process group

from multiprocessing import forkserver

import pytest
import torch

from titanarch.testing.processes import context

LONGEST_FIRST = ("test_nodes.py", "test_launcher.py", "test_run.py", "test_layouts.py", "test_resharding.py", "test_launchers.py")
"""Files of minutes: begun first, so that two workers end together."""


def pytest_sessionstart(session: pytest.Session) -> None:
    """Start the server that forks the ranks of tests, before a test starts a lighter one for data workers. It makes itself ready aside."""
    runs_tests = hasattr(session.config, "workerinput") or not session.config.getoption("numprocesses", None)
    if runs_tests and not session.config.option.collectonly:
        context()
        forkserver.ensure_running()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first. Skip what carries the marker ``gpu`` where there is no GPU."""
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.name) if item.path.name in LONGEST_FIRST else len(LONGEST_FIRST))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU; torch sees none"))
