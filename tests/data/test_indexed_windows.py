"""Windows of indexed tokens, read all at once where one file holds them."""

from pathlib import Path

import numpy as np
import pytest

from titanarch.data.index_writer import IndexWriter
from titanarch.data.indexed import IndexedData
from titanarch.data.tokenizers import BytesConfig, BytesTokenizer

BYTES = BytesTokenizer(BytesConfig())


@pytest.mark.parametrize("shard_bytes", [64, 1 << 30])
def test_windows_are_slices_of_all_tokens(shard_bytes: int, tmp_path: Path) -> None:
    texts = [chr(97 + i) * (3 + 5 * i) for i in range(12)]
    (tmp_path / "data").mkdir()
    with IndexWriter(tmp_path / "data", BYTES, shard_bytes=shard_bytes) as writer:
        for i, text in enumerate(texts):
            writer.add(f"d{i}", BYTES.encode(text), len(text))
        writer.finish("a test")
    data = IndexedData(tmp_path / "data", BYTES)
    assert (len(list((tmp_path / "data").glob("tokens-*.bin"))) == 1) is (shard_bytes == 1 << 30)
    tokens = np.concatenate([np.append(BYTES.encode(text), BYTES.eos_id or 0) for text in texts])
    assert len(tokens) == data.n_tokens
    last = len(tokens) - 9
    for starts in ([0, last, 17, 18, 17], [last], [last, last + 3], []):
        expected = np.zeros((len(starts), 9), dtype=np.int64)
        for row, start in enumerate(starts):
            expected[row, : len(tokens) - start] = tokens[start : start + 9]
        assert data.windows(np.array(starts, dtype=np.int64), 9).tolist() == expected.tolist()
    part = data.first(5)
    assert part.windows(np.array([part.n_tokens - 3]), 9)[0, 3:].tolist() == [0] * 6
