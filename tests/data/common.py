"""What the tests of data share: small sources of known documents, loaders over them, and naive rows to compare with."""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from titanarch.data.batch import Batch
from titanarch.data.config import DataConfig
from titanarch.data.loader import build_loader
from titanarch.data.phases import Phase, Phases
from titanarch.data.row_loader import RowLoader, merge_states
from titanarch.data.tokenizers import build_tokenizer

WORDS = ["the", "of", "and", "to", "in", "that", "it", "was", "his", "with", "as", "for", "had", "you", "not", "which", "have"]


def make_texts(n: int, *, seed: int = 0, longest: int = 60) -> list[str]:
    """Documents of 1 to ``longest`` words, a few of them with characters of several bytes."""
    draw = random.Random(seed)
    return [" ".join(draw.choices([*WORDS, "naïve", "日本"], k=draw.randint(1, longest))) for _ in range(n)]


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": f"d{i}"}) + "\n" for i, text in enumerate(texts)), encoding="utf-8")
    return path


def data_config(cache: Path, **table: Any) -> DataConfig:
    """The sources are so small that most tests go over them many times."""
    return DataConfig.model_validate({"cache_dir": str(cache), "tokenizer": "bytes", "allow_repeat": True, **table})


def loader_of(
    config: DataConfig,
    *,
    rows: int,
    local: int,
    rank: int,
    degree: int,
    seq_len: int = 16,
    seed: int = 3,
    earlier: Sequence[Phase] = (),
) -> RowLoader:
    tokenizer = build_tokenizer(config.tokenizer)
    return build_loader(
        config,
        tokenizer=tokenizer,
        seq_len=seq_len,
        global_batch_size=rows,
        local_batch_size=local,
        dp_rank=rank,
        dp_degree=degree,
        seed=seed,
        earlier=earlier,
    )


def phases_of(*sizes: tuple[int, int, int | None]) -> Phases:
    """Of (tokens of a row, rows of a step, steps)."""
    return Phases.of([Phase(seq_len, rows, rows, steps) for seq_len, rows, steps in sizes])


def drawn_phases(draw: random.Random, longest: int) -> Phases:
    """Up to four phases of a few hundred rows in all, some of the longest length; then endless rows of ``longest`` tokens."""
    sizes: list[tuple[int, int, int | None]] = []
    for _ in range(draw.randint(1, 4)):
        n_parts, rows = draw.choice([n for n in range(1, longest) if longest % n == 0]), draw.randint(1, 9)
        sizes.append((longest // n_parts, rows, n_parts // gcd(n_parts, rows) * draw.randint(1, 6)))
    return phases_of(*sizes, (longest, draw.randint(1, 5), None))


def content(batch: Batch) -> Iterator[tuple[int, bytes]]:
    """Number and whole content of each row."""
    for b, row in enumerate(batch.row_B.tolist()):
        tensors = (batch.tokens_BT, batch.labels_BT, batch.position_BT, batch.document_BT)
        yield row, b"".join(tensor[b].numpy().tobytes() for tensor in tensors)


def exchange(loaders: Sequence[RowLoader]) -> bool:
    """What the ranks do before each step: load the merged state where it is wanted; whether it was."""
    (wanted,) = {loader.wants_merged_state for loader in loaders}
    if wanted:
        merged = json.loads(json.dumps(merge_states([loader.state_dict() for loader in loaders])))
        for loader in loaders:
            loader.load_state_dict(merged)
    return wanted


def agreed_end(loaders: Sequence[RowLoader]) -> str:
    """What the ranks find together: each hears the least of all their numbers."""
    numbers: list[float] = []

    def hear(number: float) -> float:
        numbers.append(number)
        return number

    for loader in loaders:
        loader.ended_for_all(hear)
    assert len(numbers) in (0, len(loaders)), "all ask or none"
    (reason,) = {loader.ended_for_all(lambda _: min(numbers)) for loader in loaders}
    return reason


def run_steps(config: DataConfig, state: dict[str, Any] | None, *, steps: int, rows: int, local: int, degree: int, **options: Any):
    """``steps`` steps on ``degree`` ranks from ``state``: the content of each row by its number, and the merged state."""
    loaders = [loader_of(config, rows=rows, local=local, rank=rank, degree=degree, **options) for rank in range(degree)]
    for loader in loaders if state is not None else ():
        loader.load_state_dict(json.loads(json.dumps(state)))
    seen: dict[int, bytes] = {}
    for _ in range(steps):
        exchange(loaders)
        for loader in loaders:
            for _ in range(loader.accumulation_steps):
                for row, whole in content(next(loader)):
                    assert row not in seen, f"row {row} was handed out twice"
                    seen[row] = whole
    merged = merge_states([loader.state_dict() for loader in loaders])
    for loader in loaders:
        loader.close()
    return seen, merged


def naive_row(tokens: np.ndarray, begins: set[int], start: int, seq_len: int) -> bytes:
    """What ``content`` gives for the window at ``start``, token by token; ``begins``: where documents begin in ``tokens``."""
    inputs, labels, positions, documents = [], [], [], []
    position, document = 0, 0
    for t in range(start, start + seq_len):
        if t in begins and t > start:
            position, document = 0, document + 1
        inputs.append(int(tokens[t]))
        labels.append(-100 if t + 1 in begins else int(tokens[t + 1]))
        positions.append(position)
        documents.append(document)
        position += 1
    return b"".join(np.array(values, dtype=np.int64).tobytes() for values in (inputs, labels, positions, documents))


def joined_bytes(texts: Iterable[str]) -> tuple[np.ndarray, set[int]]:
    """Documents end to end as the bytes tokenizer gives them, and where each begins."""
    tokens: list[int] = []
    begins = set()
    for text in texts:
        begins.add(len(tokens))
        tokens += [*text.encode(), 256]
    begins.add(len(tokens))
    return np.array(tokens), begins
