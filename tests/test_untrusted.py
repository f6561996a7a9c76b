"""Files from strangers: a pickle that would do something stands wherever a file is read, and nothing of it is done."""

import io
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.common import checkpointer, filled, one_process, save_steps
from tests.checkpoint.test_failures import recommit
from tests.data.common import data_config, loader_of, make_texts, write_jsonl
from titanarch.checkpoint.errors import CheckpointError
from titanarch.checkpoint.marker import MARKER
from titanarch.checkpoint.opened import open_checkpoint
from titanarch.checkpoint.store import load
from titanarch.cli.main import main
from titanarch.config.errors import ConfigError
from titanarch.data.tokenizers import TOKENIZERS, build_tokenizer
from titanarch.train.metrics.files import read_json
from titanarch.train.run_lock import RunLock

__all__ = ["one_process"]


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """What an executed pickle would make; the pickle is one that does, and here it was not."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Evil(path)))
    path.rmdir()
    yield path
    assert not path.exists(), "a file's pickle was executed"


def as_pickle(target: Path) -> bytes:
    return pickle.dumps(Evil(target))


def as_torch_file(target: Path) -> bytes:
    file = io.BytesIO()
    torch.save(Evil(target), file)
    return file.getvalue()


CONTENTS = [as_pickle, as_torch_file]


def poison_data(folder: Path, content: bytes) -> None:
    """All tensors of a checkpoint are where ``content`` is."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    for place in index.storage_data.values():
        place.offset, place.length = 0, len(content)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    (folder / "__0_0.distcp").write_bytes(content)
    recommit(folder)


def poison_index(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    recommit(folder)


def poison_marker(folder: Path, content: bytes) -> None:
    (folder / MARKER).write_bytes(content)


POISONS = {
    "data": (poison_data, "could not be read"),
    "index": (poison_index, "refused"),
    "marker": (poison_marker, "is cut off or no JSON"),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("poisoned", POISONS)
def test_checkpoints_and_initial_weights(tmp_path: Path, target: Path, poisoned: str, content: Callable[[Path], bytes]) -> None:
    save_steps(tmp_path, [1])
    folder = tmp_path / "checkpoints" / "step-00000001"
    poison, said = POISONS[poisoned]
    poison(folder, content(target))
    with pytest.raises(CheckpointError, match=said):
        load(folder.parent, filled(0))
    saver = checkpointer(tmp_path / "other", initial_load_path=str(folder))
    with pytest.raises((CheckpointError, ConfigError), match=said):
        saver.load_initial(filled(0))
    saver.close()
    with pytest.raises((CheckpointError, ConfigError), match=said):
        opened = open_checkpoint(str(folder))
        opened.read("model.w")
    assert main(["checkpoint", "ls", str(folder.parent)]) == 0


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("kind", sorted(kind for kind in TOKENIZERS if "path" in TOKENIZERS[kind].Config.model_fields))
def test_tokenizers(tmp_path: Path, target: Path, kind: str, content: Callable[[Path], bytes]) -> None:
    path = tmp_path / "tokenizer"
    path.write_bytes(content(target))
    more = {"pattern": "a+", "special_tokens": {"<end>": 300}, "eos_token": "<end>"} if kind == "tiktoken" else {}
    with pytest.raises(ConfigError, match="tokenizer"):
        build_tokenizer(TOKENIZERS[kind].Config.model_validate({"path": str(path), **more}))


@pytest.mark.parametrize("content", CONTENTS)
def test_token_shards_and_indices(tmp_path: Path, target: Path, content: Callable[[Path], bytes]) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", make_texts(20))
    prepare = ["data", "prepare", "--data.tokenizer", "bytes", "--data.source.kind", "jsonl", "--data.source.paths", f'["{texts}"]']
    assert main([*prepare, "--out", str(tmp_path / "tokens")]) == 0
    config = data_config(tmp_path / "cache", source={"kind": "tokens", "path": str(tmp_path / "tokens")})
    loader_of(config, rows=2, local=2, rank=0, degree=1).close()
    for path in sorted((tmp_path / "tokens" / "train").iterdir()):
        whole = path.read_bytes()
        path.write_bytes(content(target))
        with pytest.raises(ConfigError, match=path.name.partition(".")[0]):
            loader_of(config, rows=2, local=2, rank=0, degree=1)
        path.write_bytes(whole)


def test_the_files_of_a_run(tmp_path: Path, target: Path) -> None:
    for content in CONTENTS:
        for name in ("result.json", "run.lock"):
            (tmp_path / name).write_bytes(content(target))
        with pytest.raises(ConfigError, match="is not JSON"):
            read_json(tmp_path / "result.json")
        RunLock(tmp_path / "run.lock").release()
        ledger = tmp_path / "ledger" / "start-00001" / "process-00000.jsonl"
        ledger.parent.mkdir(parents=True, exist_ok=True)
        ledger.write_bytes(content(target) + b"\n")
        assert main(["data", "ledger", str(tmp_path)]) == 2
