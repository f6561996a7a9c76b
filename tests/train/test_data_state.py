"""The place in the data, on two processes whose streams move between them."""

from pathlib import Path

import torch.distributed as dist

from tests.data.common import content, data_config, loader_of, make_texts, write_jsonl
from tests.distributed import run_distributed
from titanarch.checkpoint.config import CheckpointConfig
from titanarch.checkpoint.store import Checkpointer
from titanarch.data.phases import Phase
from titanarch.train.progress import DataState

TO_ROW = 4 * 3 + 12 * 2 + 6
"""After a step of the last of three phases."""


def rows_after(folder: Path) -> tuple[dict[int, bytes], dict[str, dict[str, int]]]:
    """This rank's rows of the step that begins at TO_ROW, and the cursors after it."""
    rank, degree = dist.get_rank(), dist.get_world_size()
    config = data_config(folder / "cache", source={"kind": "jsonl", "paths": [str(folder / "a.jsonl")]}, mode="streamed")
    earlier = [Phase(16, 4, 4 // degree, 3), Phase(8, 12, 12 // degree, 2)]
    loader = loader_of(config, rows=6, local=6 // degree, rank=rank, degree=degree, earlier=earlier)
    checkpointer = Checkpointer(CheckpointConfig(), folder)
    data = DataState(loader, checkpointer)
    data.pass_rows(TO_ROW)
    data.exchange()
    found = dict(content(next(loader)))
    cursors = data.state_dict()["cursors"]
    checkpointer.close()
    return found, cursors


def test_rows_are_passed_through_phases_that_move_streams(tmp_path: Path) -> None:
    """As where a run goes back to a checkpoint and on with later rows."""
    write_jsonl(tmp_path / "a.jsonl", make_texts(60))
    ((rows, cursors),) = run_distributed(rows_after, 1, tmp_path)
    assert sorted(rows) == list(range(TO_ROW, TO_ROW + 6))
    first, second = run_distributed(rows_after, 2, tmp_path)
    assert first[0].keys() == set(range(TO_ROW, TO_ROW + 3)), "each has its own rows"
    assert (first[0] | second[0], first[1], second[1]) == (rows, cursors, cursors)
